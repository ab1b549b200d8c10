"""The models that a study measures after training: the checkpoint of each run, and why one cannot be used here."""

from __future__ import annotations

from pathlib import Path

import torch

from psannlm.experiments.model import Study, StudyRun
from psannlm.experiments.run_state import RunState
from psannlm.models.artifact import load_model
from psannlm.models.transformer import Transformer
from psannlm.runtime.distributed import World
from psannlm.training.checkpoint import BEST, LATEST, read_pointer, step_of


def why_no_model(study: Study, state: RunState, step: int) -> str:
    """Return why the model of ``step`` of a finished run cannot be measured here; empty if it can."""
    record = state.record
    assert record is not None
    folder = measured_checkpoint(study, state.run)
    if folder is None:
        return "the report it was reused from has none" if record.origin else "its checkpoint is gone"
    if step_of(folder) != step:
        return f"its checkpoint is that of step {step_of(folder)}, not {step}"
    if record.system.get("gpus") and state.run.config.train.device != "cpu" and not torch.cuda.is_available():
        return "it was trained on a GPU, and there is none here; use --no-train on a machine with one"
    return ""


def measured_checkpoint(study: Study, run: StudyRun) -> Path | None:
    """Return the checkpoint of the last step, or of the best validation if the plan measures that; None without one."""
    return read_pointer(run.folder, BEST if study.plan.settings.measure == "best" else LATEST)


def measured_model(study: Study, run: StudyRun) -> tuple[Transformer, torch.device]:
    """Return the model of :func:`measured_checkpoint`, which must be there, on the device of the run's kind.

    Raises:
        ArtifactError: it cannot be read.
    """
    folder = measured_checkpoint(study, run)
    assert folder is not None
    wanted = run.config.train.device
    device = World().pick_device("auto" if wanted.startswith("cuda") else wanted)
    return load_model(folder).model.to(device), device

"""Resume: find and check the checkpoint of a run folder, restore its state, and archive what does not belong to it."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from psannlm.config.non_semantic import NON_SEMANTIC_KEYS
from psannlm.config.run import RunConfig, differences
from psannlm.data.order import ORDER_VERSION
from psannlm.data.prepare import PREPARATION, PreparedData
from psannlm.errors import ArtifactError, ConfigError, Problem, StorageError
from psannlm.io.atomic import explain_write_errors
from psannlm.io.lock import RunLock
from psannlm.io.run_metadata import timestamp
from psannlm.models.transformer import Transformer
from psannlm.training.averaging import WeightAverage
from psannlm.training.checkpoint import (
    BEST,
    EMA_FILE,
    LATEST,
    TrainerState,
    is_own_checkpoint,
    latest_valid_checkpoint,
    list_checkpoints,
    point,
    read_optimizer,
    read_state,
    step_folder,
    step_of,
)
from psannlm.training.optim import OptimizerSet
from psannlm.training.run_folder import foreign_entry

log = logging.getLogger(__name__)


def identity(data: PreparedData) -> dict[str, Any]:
    """Return the fields of ``TrainerState`` that identify the windows of a run and their order."""
    return {
        "corpus_sha256": data.report.sha256,
        "tokenizer_fingerprint": data.tokenizer.fingerprint,
        "data_order": ORDER_VERSION,
        "preparation": data.preparation or PREPARATION,
    }


def preparation(found: tuple[Path, TrainerState] | None) -> int:
    """Return the preparation version of a run that resumes from ``found``, or the current one for a new run."""
    return PREPARATION if found is None else found[1].preparation or 1


def find_state(config: RunConfig, folder: Path, resume: str) -> tuple[Path, TrainerState] | None:
    """Return the checkpoint to resume from, or None to start from scratch; ``resume`` as in ``run.train``.

    Raises:
        ConfigError: there is no such folder, or the checkpoint belongs to another configuration; the message lists the
            keys that differ.
        ArtifactError: the given checkpoint, or every one of the run, is damaged.
    """
    if resume == "never":
        return None
    if resume == "auto":
        found = latest_valid_checkpoint(folder)
        if found is None:
            return None
    elif list_checkpoints(Path(resume)):
        raise ConfigError(
            f"{resume} is a run folder; give one of its checkpoints: --resume {list_checkpoints(Path(resume))[-1]}"
        )
    elif not resume or not Path(resume).is_dir():
        raise ConfigError(
            f"{resume!r} is not a checkpoint directory; --resume takes auto, never, or the path of a checkpoint"
        )
    else:
        found = (Path(resume), read_state(Path(resume)))
    try:
        # Not config_from_mapping: a run of the Python API may have had its own validation data.
        former = RunConfig.model_validate(found[1].config)
    except (ValidationError, ConfigError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{found[0]} holds a configuration that this version cannot read: {reason:.300}") from error
    changed = [line for line in differences(former, config) if line.partition(":")[0] not in NON_SEMANTIC_KEYS]
    if resume != "auto":
        for line in changed:
            log.info(f"changed since the checkpoint: {line}")
        changed = [line for line in changed if not line.startswith("train.")]
    if changed:
        what = "\n  ".join(changed)
        remedy = "Restore the original values, choose another train.checkpoint_dir (--out), or use --resume never"
        if resume == "auto":
            remedy += (
                f" (it renames the old run folder); to change train settings during a run, use --resume {found[0]}"
            )
        raise ConfigError(f"{found[0]} was trained with other settings:\n  {what}\n{remedy}.")
    return found


def refuse_past_schedule(found: tuple[Path, TrainerState], total_steps: int) -> None:
    """Raise ConfigError if a run of ``total_steps`` cannot resume from the checkpoint.

    The checkpoint is past the last step; or it is in the cooldown of a ``wsd`` schedule of another length, where the
    learning rate has already decreased.
    """
    folder, state = found
    if state.step > total_steps:
        raise ConfigError(
            f"{folder} is after step {state.step}, and this run ends at {total_steps}; set train.max_steps to "
            f"{state.step} or more, or resume from an earlier checkpoint"
        )
    former = state.total_steps
    if former is None or former == total_steps:
        return
    flat = former - RunConfig.model_validate(state.config).train.cooldown_steps(former)
    if flat < min(state.step, former):
        raise ConfigError(
            f"{folder} is in the cooldown of a schedule of {former} steps, which started after step {flat}; to train "
            f"{total_steps} steps, resume from a checkpoint of step {flat} or before, or set train.max_steps: {former}"
        )


def refuse_other_data(found: tuple[Path, TrainerState], data: PreparedData) -> None:
    """Raise ConfigError unless ``data`` has the text and the tokenizer that the checkpoint was trained on."""
    folder, state = found
    now = identity(data)
    if state.data_order != now["data_order"]:
        raise ConfigError(
            f"{folder} has a data order that this version no longer supports "
            f"({state.data_order or 'list-1'} then, {now['data_order']} now): some windows would be read twice and "
            "others never. Finish the run with the version that started it, or start over with --resume never."
        )
    if data.preparation not in (None, preparation(found)):
        raise ConfigError(
            f"{folder} was started by an older psannlm, which held out other documents and encoded long ones uncut. "
            "Resume with psannlm train and its configuration, which prepares the corpus as that version did, or start "
            "over with --resume never."
        )
    for name, former in (
        ("corpus_sha256", state.corpus_sha256),
        ("tokenizer_fingerprint", state.tokenizer_fingerprint),
    ):
        if now[name] != former:
            what = name.replace("_", " ")
            message = f"{folder} was trained on other data: {what} {former[:12]} then, {now[name][:12]} now"
            raise ConfigError(f"{message}. Restore the former text, or start over with --resume never.")


def same_model(loaded: Transformer, given: Transformer | None) -> Transformer:
    """Return the loaded model, or the caller's own with its weights. Raises ConfigError if that one does not fit."""
    if given is None:
        return loaded
    if given.config != loaded.config:
        raise ConfigError(Problem("model", "the checkpoint holds a model of another configuration"))
    given.load_state_dict(loaded.state_dict())
    return given


def restore(
    found: tuple[Path, TrainerState],
    folder: Path,
    optimizers: OptimizerSet,
    scaler: torch.amp.GradScaler,
    average: WeightAverage | None = None,
) -> TrainerState:
    """Load a checkpoint into the optimisers, the scaler and the average; return the state to resume from.

    An average that the checkpoint lacks starts at its weights.

    Raises:
        ArtifactError: the state is damaged, or of another optimiser or precision.
    """
    checkpoint, state = found
    optimizers.load_tensors(read_optimizer(checkpoint))
    if scaler.is_enabled():
        if not state.scaler:
            raise ArtifactError(
                f"{checkpoint} has no state of the fp16 gradient scaler: it was trained in another precision"
            )
        scaler.load_state_dict(state.scaler)
    if average is not None and (checkpoint / EMA_FILE).is_file():
        average.load(checkpoint / EMA_FILE)
    elif average is not None:
        log.info(f"{checkpoint} has no average of the weights: that of train.ema starts at its weights")
    # A best checkpoint outside this run folder cannot be returned as a result: the next validation sets a new one.
    best = state.best
    if best is not None and not (_is_in(checkpoint, folder) and step_folder(folder, best["step"]).is_dir()):
        best = None
    return replace(state, best=best, ema=None if average is None else state.ema)


def _is_in(checkpoint: Path, folder: Path) -> bool:
    return checkpoint.resolve().parent == folder.resolve()


def archive_newer_checkpoints(lock: RunLock, checkpoint: Path, best: dict[str, Any] | None) -> None:
    """Move checkpoints newer than ``checkpoint`` out of the run folder, where they would count as the latest state.

    If ``checkpoint`` is in another folder, the whole run is moved aside.
    """
    folder = lock.folder
    if not _is_in(checkpoint, folder):
        move_aside(lock)
        return
    later = [
        path
        for path in list_checkpoints(folder)
        if step_of(path) > step_of(checkpoint.resolve()) and is_own_checkpoint(path)
    ]
    if later:
        aside = _free_name(folder)
        with explain_write_errors(aside):
            aside.mkdir()
            for path in later:
                path.rename(aside / path.name)
        log.info(f"moved the checkpoints after {checkpoint.name} to {aside}")
    # A process killed between a save and the update of these files leaves them out of date.
    point(folder, LATEST, step_of(checkpoint.resolve()))
    if best is not None:
        point(folder, BEST, best["step"])
    else:
        (folder / BEST).unlink(missing_ok=True)


def move_aside(lock: RunLock) -> None:
    """Rename a run folder that holds checkpoints.

    Raises:
        StorageError: renaming fails, or the folder holds a file that psannlm did not write, which would be moved too.
    """
    if not any(map(is_own_checkpoint, list_checkpoints(lock.folder))):
        return
    foreign = foreign_entry(lock.folder)
    if foreign is not None:
        raise StorageError(
            f"{foreign} would be moved with the run in {lock.folder}, and psannlm did not write it; move it, or choose "
            "another train.checkpoint_dir (--out)"
        )
    aside = _free_name(lock.folder)
    lock.move_folder(aside)
    log.info(f"moved the run in {lock.folder} to {aside}")


def _free_name(folder: Path) -> Path:
    """Return an unused, dated name beside ``folder``."""
    folder = folder.resolve()
    stem = f"{folder.name}_until_{timestamp()}"
    names = (stem if number == 1 else f"{stem}_{number}" for number in count(1))
    return next(path for path in map(folder.with_name, names) if not path.exists())

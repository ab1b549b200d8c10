"""Launcher of a study's runs as processes of this machine."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from psannlm.io.atomic import explain_write_errors, write_text
from psannlm.io.platform_files import SAFE_FLAGS
from psannlm.runtime.processes import python_command
from psannlm.training.checkpoint import list_checkpoints, step_folder
from psannlm.training.metrics import METRICS_FILE, read_metrics
from psannlm.training.run_folder import SYSTEM_FILE

if TYPE_CHECKING:
    from psannlm.experiments.model import StudyRun

log = logging.getLogger(__name__)

# First words of the log of every attempt of a run.
LOG_START = "psannlm compare starts "


class Process(Protocol):
    """The process of a run, here or elsewhere."""

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs or waits to run."""

    def terminate(self) -> None:
        """Ask the process to save a checkpoint and exit."""


Launcher = Callable[["StudyRun", Mapping[str, str]], Process]


def launch(run: StudyRun, environment: Mapping[str, str]) -> Process:
    """Start ``psannlm train`` on a run's configuration, with its output in the run's log."""
    return start_training(run.name, run.config_path, run.log_path, environment, branch_off(run))


def branch_off(run: StudyRun) -> Path | None:
    """Return the checkpoint of its trunk that a run starts from, with the trunk's log up to there in its own folder.

    None for a run that starts from scratch or resumes: it has no trunk, the trunk has no such checkpoint (it was
    reused, or failed before), or the run has one of its own.

    Raises:
        StorageError: the run's folder cannot be written.
    """
    if run.trunk is None or run.branch_step == 0 or _has_checkpoint(run.folder):
        return None
    checkpoint = step_folder(run.trunk, run.branch_step)
    if not checkpoint.is_dir():
        log.info(f"{run.name} is trained from scratch: there is no {checkpoint}")
        return None
    # What a run from scratch would have logged; training keeps the rows up to the step it starts from.
    with explain_write_errors(run.folder):
        run.folder.mkdir(exist_ok=True)
        rows = [row for row in read_metrics(run.trunk) if row["step"] <= run.branch_step]
        write_text(run.folder / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in rows))
        # It names the code of the first steps.
        shutil.copyfile(run.trunk / SYSTEM_FILE, run.folder / SYSTEM_FILE)
    return checkpoint


def _has_checkpoint(folder: Path) -> bool:
    return bool(list_checkpoints(folder))


def start_training(
    name: str,
    config: Path,
    log_path: Path,
    environment: Mapping[str, str],
    trunk: Path | None = None,
    *,
    end_with_parent: bool = False,
) -> subprocess.Popen[bytes]:
    """Start ``psannlm train`` on ``config``; its output is appended to ``log_path`` below a line with ``name``.

    Args:
        trunk: the checkpoint to start from, unless the run's folder ``name`` beside ``config`` has one already.
        environment: variables added to those of this process.
        end_with_parent: the process saves and exits when this one ends in any way (Linux only).

    Raises:
        StorageError: the log cannot be written.
    """
    options = [] if trunk is None or _has_checkpoint(config.parent / name) else [f"--resume={trunk}"]
    with explain_write_errors(log_path):
        handle = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | SAFE_FLAGS, 0o644)
    with open(handle, "a", encoding="utf-8") as file:
        gpu = environment.get("CUDA_VISIBLE_DEVICES")
        file.write(f"{LOG_START}{name}{f' on GPU {gpu}' if gpu else ''}\n")
        file.flush()
        return subprocess.Popen(
            python_command("psannlm", "train", str(config), *options, end_with_parent=end_with_parent),
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )

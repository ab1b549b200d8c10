"""Launcher of a study's runs as processes of this machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from psannlm.io.atomic import explain_write_errors
from psannlm.io.platform_files import SAFE_FLAGS
from psannlm.runtime.processes import python_command

if TYPE_CHECKING:
    from psannlm.experiments.model import StudyRun

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
    return start_training(run.name, run.config_path, run.log_path, environment)


def start_training(
    name: str, config: Path, log_path: Path, environment: Mapping[str, str], *, end_with_parent: bool = False
) -> subprocess.Popen[bytes]:
    """Start ``psannlm train`` on ``config``; its output is appended to ``log_path`` below a line with ``name``.

    Args:
        environment: variables added to those of this process.
        end_with_parent: the process saves and exits when this one ends in any way (Linux only).

    Raises:
        StorageError: the log cannot be written.
    """
    with explain_write_errors(log_path):
        handle = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | SAFE_FLAGS, 0o644)
    with open(handle, "a", encoding="utf-8") as log:
        gpu = environment.get("CUDA_VISIBLE_DEVICES")
        log.write(f"{LOG_START}{name}{f' on GPU {gpu}' if gpu else ''}\n")
        log.flush()
        return subprocess.Popen(
            python_command("psannlm", "train", str(config), end_with_parent=end_with_parent),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )

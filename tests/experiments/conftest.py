"""Studies whose runs are trained in the process of the test."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from psannlm.config.run import load_config
from psannlm.experiments.local_launcher import Process
from psannlm.experiments.model import StudyRun
from psannlm.training.run import train


class Ended:
    """A process that has ended with ``code``."""

    def __init__(self, code: int = 0) -> None:
        self._code = code

    def poll(self) -> int | None:
        return self._code

    def terminate(self) -> None:
        raise AssertionError("no process is active")


def train_here(run: StudyRun, environment: Mapping[str, str]) -> Process:
    """Train a run as a launcher's process would, without the process."""
    train(load_config(run.config_path))
    return Ended()


def spare_disk(patch: pytest.MonkeyPatch) -> None:
    """Draw no picture after each run, and wait for no disk."""
    patch.setattr("psannlm.training.run.draw_curve", lambda folder, title, rows: folder / "loss_curve.png")
    patch.setattr("os.fsync", lambda handle: None)

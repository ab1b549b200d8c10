"""Reporter protocol: the events of a training run that a console or a notebook can show."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from psannlm.evaluation.loss import Evaluation


class Reporter(Protocol):
    """Receiver of a run's events. Ranks other than 0 get a :class:`SilentReporter`."""

    def notice(self, text: str) -> None:
        """Show a message once."""

    def start(self, step: int, total_steps: int) -> None:
        """Training starts after ``step`` of ``total_steps``."""

    def step(self, step: int, loss: float, lr: float, tokens_per_s: float, is_logged: bool) -> None:
        """A step was completed; ``is_logged`` at the log interval."""

    def skipped(self, step: int, n_skipped: int, text: str) -> None:
        """A step was skipped, the ``n_skipped``-th of the run; ``text`` gives the step and the reason."""

    def evaluation(self, step: int, result: Evaluation, is_best: bool) -> None:
        """A validation was completed."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """The model continued ``prompt`` with ``text``."""

    def saved(self, folder: Path) -> None:
        """A checkpoint was written to ``folder``."""

    def stop(self) -> None:
        """Training ended, with or without an error."""


class SilentReporter:
    """Reporter that shows nothing."""

    def notice(self, text: str) -> None: ...
    def start(self, step: int, total_steps: int) -> None: ...
    def step(self, step: int, loss: float, lr: float, tokens_per_s: float, is_logged: bool) -> None: ...
    def skipped(self, step: int, n_skipped: int, text: str) -> None: ...
    def evaluation(self, step: int, result: Evaluation, is_best: bool) -> None: ...
    def sample(self, step: int, prompt: str, text: str) -> None: ...
    def saved(self, folder: Path) -> None: ...
    def stop(self) -> None: ...

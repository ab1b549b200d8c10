"""Callbacks of a training run: what is called after steps, validations, saves and at the end, and with what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from psannlm.evaluation.loss import Evaluation
from psannlm.training.result import TrainResult


@dataclass(frozen=True)
class StepEvent:
    """One optimiser step, numbered from 1.

    ``loss`` is the mean over all labels of all ranks in nats per token, ``grad_norm`` the global norm before clipping.
    ``tokens`` counts the labels learned from since the run began, ``epoch`` the passes that are complete. A step that
    ``train.on_nonfinite: skip`` left out ``is_skipped``: its loss or norm is NaN or Inf, and the weights are unchanged.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_s: float
    is_skipped: bool


@dataclass(frozen=True)
class ValidationEvent:
    """A validation after ``step``: its loss (nats per token), perplexity and bits per byte are those of ``result``."""

    step: int
    result: Evaluation
    is_best: bool


@dataclass(frozen=True)
class SaveEvent:
    """A checkpoint that was written to ``folder`` after ``step``, whole and hashed; ``is_best``: the best so far."""

    step: int
    folder: Path
    is_best: bool


class Callback:
    """Base class of training callbacks: every method does nothing; override those you need.

    Each is called in the process that trains, on rank 0 alone where there are several ranks, with the weights of that
    very step in the model. An error it raises ends the run as it is; the last checkpoint stays. Drawing random numbers
    is safe: each step seeds its own. A callback costs a GPU a little speed, because each step is waited for.
    """

    def on_step(self, event: StepEvent) -> None:
        """Called after every optimiser step."""

    def on_validation(self, event: ValidationEvent) -> None:
        """Called after every validation, before its checkpoint is written."""

    def on_save(self, event: SaveEvent) -> None:
        """Called after every checkpoint."""

    def on_end(self, result: TrainResult) -> None:
        """Called once when the run ends, at its last step or earlier as asked; not after an error or a signal."""

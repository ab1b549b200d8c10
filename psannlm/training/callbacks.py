"""Callbacks of a training run: the events after steps, validations and saves, and the result at the end."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from psannlm.data.record_figures import TrainRecord
from psannlm.evaluation.loss import Evaluation
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.roundtrip import LOSSY


@dataclass(frozen=True)
class StepEvent:
    """One optimiser step, numbered from 1.

    ``loss`` is the mean over all labels of all ranks in nats per token, ``grad_norm`` the global norm before clipping.
    ``tokens`` counts the labels trained on since the start of the run, ``epoch`` the complete passes. A step that
    ``train.on_nonfinite: skip`` skipped has ``is_skipped``: its loss or norm is NaN or Inf, and the weights are
    unchanged. ``n_skipped`` counts the skipped steps of the run; ``is_logged`` is set at the log interval.
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
    n_skipped: int = 0
    is_logged: bool = False


@dataclass(frozen=True)
class ValidationEvent:
    """A validation after ``step``; ``result`` has the loss (nats per token), perplexity and bits per byte.

    ``ema`` is the same of the averaged weights (``train.ema``), else None; ``is_best`` does not depend on it.
    """

    step: int
    result: Evaluation
    is_best: bool
    ema: Evaluation | None = None

    def __str__(self) -> str:
        figures = self.result
        averaged = "" if self.ema is None else f"; EMA of the weights: loss {self.ema.loss:.4f}"
        return (
            f"validation at step {self.step}: loss {figures.loss:.4f}  perplexity {figures.perplexity:.2f}  "
            f"{figures.bits_per_byte:.4f} bits per byte{LOSSY if figures.lossy_tokenizer else ''}"
            f"{'  (best so far)' if self.is_best else ''}{averaged}"
        )


@dataclass(frozen=True)
class SaveEvent:
    """A checkpoint written to ``folder`` after ``step``; ``is_best``: it has the lowest validation loss so far."""

    step: int
    folder: Path
    is_best: bool


@dataclass(frozen=True)
class TrainResult:
    """Result of a training run.

    Attributes:
        model: the weights of the last step, in evaluation mode. After ``fsdp: full`` they are on rank 0 and on ranks
            whose caller passed a full model; other ranks hold shapes only.
        folder: the run folder.
        checkpoint: the best checkpoint, or without validation the last.
        curve: image of the loss curve; None if it could not be drawn.
        steps: steps completed of ``total_steps``; fewer if a time budget was spent.
        epochs: passes over the training windows, with fractions.
        tokens: labels trained on.
        skipped: steps skipped because they were not finite.
        seconds: time since the start or the last resume.
        train_loss: loss of the last step in nats per token.
        best: ``step``, ``loss`` (nats per token), ``perplexity`` and ``bits_per_byte`` of the best validation; None
            without validation.
        ema: the same of the averaged weights at the last validation; None without ``train.ema`` or without validation.
        val_overlap: fraction of the validation text that also occurs verbatim in the training text.
        lossy_tokenizer: whether the tokenizer loses text, which makes bits per byte too low; None: unknown.
    """

    model: Transformer
    folder: Path
    checkpoint: Path
    curve: Path | None
    steps: int
    total_steps: int
    epochs: float
    tokens: int
    parameters: int
    skipped: int
    seconds: float
    train_loss: float
    best: dict[str, Any] | None
    val_overlap: float | None
    lossy_tokenizer: bool | None = None
    ema: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return all fields but ``model`` as plain data."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "model"}
        texts = {key: str(value) for key, value in plain.items() if isinstance(value, Path)}
        return TrainRecord(**{**plain, **texts}).as_dict()


class Callback:
    """Base class of training callbacks. Every method does nothing; override those you need.

    Methods run in the training process, with several ranks on rank 0 only, while the model has the weights of that
    step. An exception ends the run; the last checkpoint is kept. Random numbers may be drawn: each step sets its own
    seed. With a callback the process waits for the GPU at each step, which costs a little speed.
    """

    def on_step(self, event: StepEvent) -> None:
        """Called after every optimiser step."""

    def on_validation(self, event: ValidationEvent) -> None:
        """Called after every validation, before its checkpoint is written."""

    def on_save(self, event: SaveEvent) -> None:
        """Called after every checkpoint."""

    def on_end(self, result: TrainResult) -> None:
        """Called once at the end of the run, at its last step or on request; not after an error or a signal."""

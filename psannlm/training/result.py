"""Result of a training run."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from psannlm.data.record_figures import TrainRecord
from psannlm.models.transformer import Transformer


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

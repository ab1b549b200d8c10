"""What a training run returns."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from psannlm.models.transformer import Transformer


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run.

    ``model`` holds the weights of the last step, in evaluation mode: after ``fsdp: full`` on rank 0 and
    where they were given, shapes alone elsewhere. ``steps`` of ``total_steps`` were made, fewer
    where a time budget was spent; ``epochs`` is how many passes over the training windows they are, in fractions.
    ``best`` holds ``step``, ``loss`` (nats per token), ``perplexity`` and
    ``bits_per_byte`` of the best validation, or is None without one. ``checkpoint`` is the best checkpoint, or without
    validation the last. ``val_overlap`` is the fraction of the held-out text that stands word for word in the training
    text. ``lossy_tokenizer`` says that the tokenizer loses text, which makes bits per byte too low; None is unknown.
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

    def as_dict(self) -> dict[str, Any]:
        """Return the figures and paths as plain data, without the model."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "model"}
        return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}

"""Failures of a training step: non-finite loss or gradients, and memory that ran out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from psannlm.config.run import RunConfig
from psannlm.data.loader import Loader, Position
from psannlm.errors import TrainingError, is_out_of_memory
from psannlm.training.checkpoint import list_checkpoints
from psannlm.training.step import StepResult

# Number of consecutive non-finite steps at which ``train.on_nonfinite: skip`` gives up.
MAX_CONSECUTIVE_SKIPS = 3
# Part of the message of every ``DivergedError``. Study folders written before ``status.json`` are read by it.
NOT_FINITE = "not finite"
_NAMED_WINDOWS = 8
_DESCRIBED_WINDOWS = 4


@dataclass(frozen=True)
class NonFiniteStep:
    """A step with a non-finite loss or gradient: its metrics, its windows (of all ranks), and their documents."""

    step: int
    loss: float
    grad_norm: float
    windows: list[int]
    source: str

    def as_dict(self) -> dict[str, Any]:
        """Return all fields but ``step`` as plain data."""
        return {name: value for name, value in vars(self).items() if name != "step"}

    def __str__(self) -> str:
        n_more = len(self.windows) - _NAMED_WINDOWS
        more = f" and {n_more} more" if n_more > 0 else ""
        return (
            f"step {self.step}: loss {self.loss:g}, gradient norm {self.grad_norm:g}: {NOT_FINITE}. Windows "
            f"{self.windows[:_NAMED_WINDOWS]}{more} ({self.source})"
        )


def describe_non_finite(step: int, result: StepResult, loader: Loader, at: Position, n_windows: int) -> NonFiniteStep:
    """Return the description of a step that started at position ``at`` and read ``n_windows`` over all ranks."""
    windows = [int(window) for window in loader.order(at.epoch)[at.window : at.window + n_windows]]
    source = "; ".join(loader.windows.describe(window) for window in windows[:_DESCRIBED_WINDOWS])
    return NonFiniteStep(step, result.loss, result.grad_norm, windows, source)


def describe_last_checkpoint(folder: Path) -> str:
    """Return a clause that names the last checkpoint of the run in ``folder``."""
    saved = list_checkpoints(folder)
    return f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet"


def find_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor with a NaN or an infinity, or None."""
    floats = ((name, tensor) for name, tensor in tensors if tensor.is_floating_point())
    return next((name for name, tensor in floats if not bool(torch.isfinite(tensor).all())), None)


@contextmanager
def explain_oom(config: RunConfig, step: int) -> Iterator[None]:
    """Turn an out-of-memory error into a TrainingError that names the keys to lower and their current values."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(f"out of memory at step {step}: {_memory_remedies(config)}") from error


def _memory_remedies(config: RunConfig) -> str:
    """Return the settings that lower the memory of a step, joined to one clause."""
    train, remedies = config.train, []
    if train.batch_tokens >= 2 * config.data.max_length:
        kept = "raise train.grad_accum_steps by as much to keep the step as it is"
        if train.global_batch_tokens is not None:
            kept = "train.global_batch_tokens keeps the step as it is"
        remedies.append(f"lower train.batch_tokens ({train.batch_tokens} now; {kept})")
    if not train.grad_checkpoint:
        remedies.append("set train.grad_checkpoint: true")
    if not remedies:
        remedies.append(f"lower data.max_length ({config.data.max_length} now)")
    remedies.append(f"take a smaller model (model.d_model is {config.model.d_model}, n_layers {config.model.n_layers})")
    return "; or ".join([", ".join(remedies[:-1]), remedies[-1]])

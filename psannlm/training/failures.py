"""What can go wrong within a step, to one line that says where, why and what to do: numbers not finite, memory."""

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

# Steps that are not finite, one after the other, from which on leaving them out leads nowhere.
TOO_MANY_IN_A_ROW = 3
# These words stand in the error of every run that ended because its numbers were none.
NOT_FINITE = "not finite"
_NAMED_WINDOWS = 8
_DESCRIBED_WINDOWS = 4


@dataclass(frozen=True)
class NotFinite:
    """A step whose loss or gradient is not finite: its figures, its windows (of all ranks), and their documents."""

    step: int
    loss: float
    grad_norm: float
    windows: list[int]
    source: str

    def as_dict(self) -> dict[str, Any]:
        """Return all but the step as plain data."""
        return {name: value for name, value in vars(self).items() if name != "step"}

    def __str__(self) -> str:
        n_more = len(self.windows) - _NAMED_WINDOWS
        more = f" and {n_more} more" if n_more > 0 else ""
        return (
            f"step {self.step}: loss {self.loss:g}, gradient norm {self.grad_norm:g}: {NOT_FINITE}. Windows "
            f"{self.windows[:_NAMED_WINDOWS]}{more} ({self.source})"
        )


def describe_not_finite(step: int, result: StepResult, loader: Loader, at: Position, n_windows: int) -> NotFinite:
    """Return what is known of a step that began at ``at`` and saw ``n_windows`` over all ranks."""
    windows = [int(window) for window in loader.order(at.epoch)[at.window : at.window + n_windows]]
    source = "; ".join(loader.windows.describe(window) for window in windows[:_DESCRIBED_WINDOWS])
    return NotFinite(step, result.loss, result.grad_norm, windows, source)


def last_saved(folder: Path) -> str:
    """Return which checkpoint of a run is the last, in words."""
    saved = list_checkpoints(folder)
    return f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet"


def find_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds a NaN or an infinity, or None."""
    floats = ((name, tensor) for name, tensor in tensors if tensor.is_floating_point())
    return next((name for name, tensor in floats if not bool(torch.isfinite(tensor).all())), None)


@contextmanager
def explaining_memory(config: RunConfig, step: int) -> Iterator[None]:
    """Turn what is raised when memory runs out into a TrainingError that says which keys to lower, and from what."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(f"out of memory at step {step}: {_less_memory(config)}") from error


def _less_memory(config: RunConfig) -> str:
    train, remedies = config.train, []
    if train.batch_tokens >= 2 * config.data.max_length:
        remedies.append(
            f"lower train.batch_tokens ({train.batch_tokens} now; raise train.grad_accum_steps by as much to keep the "
            "step as it is)"
        )
    if not train.grad_checkpoint:
        remedies.append("set train.grad_checkpoint: true")
    if not remedies:
        remedies.append(f"lower data.max_length ({config.data.max_length} now)")
    remedies.append(f"take a smaller model (model.d_model is {config.model.d_model}, n_layers {config.model.n_layers})")
    return "; or ".join([", ".join(remedies[:-1]), remedies[-1]])

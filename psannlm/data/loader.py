"""Data loader: batches of windows for optimiser steps, in an order that is a pure function of (seed, epoch).

The loader has no state of its own: it starts at a :class:`Position`, and each step carries the position after it, from
which a run resumes. A position counts the windows that all ranks have seen, so it is valid for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from psannlm.config.constants import IGNORE_INDEX
from psannlm.data.mixture import Mixture
from psannlm.data.order import permuted
from psannlm.data.prefetch import prefetched
from psannlm.data.windows import Windows
from psannlm.errors import ConfigError, CorpusError, TrainingError


@dataclass(frozen=True)
class Position:
    """A position in the data: all ranks together have seen the first ``window`` windows of this epoch's order."""

    epoch: int = 0
    window: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """Input of one forward pass: ``input_ids`` and ``labels`` (B, T) int64, and the number of valid labels.

    ``window_ids`` (B,) int64 are the indices of the windows; empty for a filler batch, which keeps ranks in step.
    ``document_positions`` (B, T) int64 are those of ``Windows.document_positions``, or None.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    n_labels: int
    window_ids: NDArray[np.int64]
    document_positions: torch.Tensor | None = None


@dataclass(frozen=True)
class StepBatch:
    """One rank's batches of an optimiser step, the position after it, and the windows that all ranks see in it.

    ``source_windows``: how many of these windows are of each source; empty without a mixture.
    """

    micro_batches: tuple[MicroBatch, ...]
    after: Position
    n_windows: int
    source_windows: tuple[int, ...] = ()


class Loader:
    """Distributes windows over steps, ranks and micro-batches.

    A step is ``micro_batch_size * grad_accum_steps * world_size`` windows. The last step of an epoch is smaller rather
    than dropped, and holds no window of the next epoch. In each step all ranks have the same number of micro-batches,
    at least one, because collective operations wait for every rank; a rank with no window left gets a filler batch
    without any valid label.
    """

    def __init__(
        self,
        windows: Windows,
        micro_batch_size: int,
        grad_accum_steps: int = 1,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 1337,
        shuffle: bool = True,
        prefetch_factor: int = 2,
        num_workers: int = 1,
        pin_memory: bool = False,
        mixture: Mixture | None = None,
    ) -> None:
        """Set up a loader; nothing is read before :meth:`steps`.

        Args:
            prefetch_factor: steps prepared in advance (default 2); 0 prepares each step when it is asked for.
            num_workers: threads that prepare steps (default 1). Steps do not depend on it, nor on ``prefetch_factor``.
            pin_memory: put batches into page-locked memory, from which copies to a GPU are asynchronous.
            mixture: the windows of an epoch, by the weights of their sources; None: every window once.

        Raises:
            ConfigError: a size is below 1, or the rank is outside the world.
            CorpusError: there is no window.
        """
        for name, value in (
            ("micro_batch_size", micro_batch_size),
            ("grad_accum_steps", grad_accum_steps),
            ("world_size", world_size),
            ("num_workers", num_workers),
        ):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be 1 or more")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is outside a world of {world_size}; ranks count from 0")
        if len(windows) == 0:
            raise CorpusError("the corpus gives no window to train on; add text")
        self.windows = windows
        self.micro_batch_size = micro_batch_size
        self.grad_accum_steps = grad_accum_steps
        self.rank, self.world_size = rank, world_size
        self.seed, self.shuffle = seed, shuffle
        self.prefetch_factor, self.num_workers, self.pin_memory = prefetch_factor, num_workers, pin_memory
        if mixture is not None and not shuffle:
            raise ConfigError("a mixture of sources has no order but a shuffled one; use shuffle=True")
        self.mixture = mixture

    @property
    def windows_per_step(self) -> int:
        """Number of windows that all ranks together see in a full step."""
        return self.micro_batch_size * self.grad_accum_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch, the smaller last one included."""
        return -(-len(self.windows) // self.windows_per_step)

    def order(self, epoch: int, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Return positions ``start`` to ``stop`` (by default all) of the order of ``epoch``; the same on every rank."""
        stop = len(self.windows) if stop is None else stop
        if not self.shuffle:
            return np.arange(start, stop, dtype=np.int64)
        if self.mixture is not None:
            return self.mixture.order(epoch, start, stop, self.seed)
        return permuted(len(self.windows), start, stop, self.seed, "epoch", epoch)

    def steps(self, position: Position | None = None) -> Iterator[StepBatch]:
        """Return an endless iterator of this rank's steps from ``position`` on (by default the start of epoch 0).

        Raises:
            TrainingError: ``position`` is outside these windows.
        """
        position = position or Position()
        if position.epoch < 0 or not 0 <= position.window <= len(self.windows):
            raise TrainingError(
                f"cannot resume at window {position.window} of epoch {position.epoch}: the corpus has "
                f"{len(self.windows)} windows. Resume with the data, tokenizer and max_length the run was started with."
            )
        return prefetched(self._step, self._walk(position), ahead=self.prefetch_factor, threads=self.num_workers)

    def _walk(self, position: Position) -> Iterator[tuple[Position, int]]:
        """Yield the start of each step and the position in its epoch where it ends."""
        n = len(self.windows)
        epoch, start = (position.epoch, position.window) if position.window < n else (position.epoch + 1, 0)
        while True:
            stop = min(start + self.windows_per_step, n)
            yield Position(epoch, start), stop
            epoch, start = (epoch, stop) if stop < n else (epoch + 1, 0)

    def _step(self, span: tuple[Position, int]) -> StepBatch:
        at, stop = span
        dealt = self.order(at.epoch, at.window, stop)
        after = Position(at.epoch, stop) if stop < len(self.windows) else Position(at.epoch + 1, 0)
        of_source = () if self.mixture is None else self.mixture.count(dealt)
        return StepBatch(self._micro_batches(dealt), after, len(dealt), of_source)

    def _micro_batches(self, dealt: NDArray[np.int64]) -> tuple[MicroBatch, ...]:
        # Round-robin, so that in a small step no rank has two windows more than another.
        mine = dealt[self.rank :: self.world_size]
        most = -(-len(dealt) // self.world_size)
        return tuple(
            self._micro_batch(mine[first : first + self.micro_batch_size])
            for first in range(0, most, self.micro_batch_size)
        )

    def _micro_batch(self, window_ids: NDArray[np.int64]) -> MicroBatch:
        document_positions = None
        if len(window_ids) == 0:
            shape = (1, self.windows.seq_len)
            input_ids = torch.full(shape, self.windows.pad_id, dtype=torch.int64)
            labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        else:
            input_ids, labels = self.windows.batch(window_ids)
            document_positions = self.windows.document_positions(window_ids)
        n_labels = int((labels != IGNORE_INDEX).sum())
        if self.pin_memory:
            input_ids, labels = input_ids.pin_memory(), labels.pin_memory()
            document_positions = None if document_positions is None else document_positions.pin_memory()
        return MicroBatch(input_ids, labels, n_labels, window_ids, document_positions)

"""Windows enter; optimiser steps leave, in an order that is a pure function of (seed, epoch), resumable anywhere.

The loader holds no state of its own: a :class:`Position` goes in and each step carries the position after it. It
counts windows that all ranks together have seen, so it means the same to a run with another number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from psannlm.data.order import permuted
from psannlm.data.prefetch import prefetched
from psannlm.data.windows import IGNORE_INDEX, Windows
from psannlm.errors import ConfigError, CorpusError, TrainingError


@dataclass(frozen=True)
class Position:
    """Where in the data a run stands: ``window`` windows of this epoch's order are behind all ranks together."""

    epoch: int = 0
    window: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes: ``input_ids`` and ``labels`` (B, T) int64, and how many labels count.

    ``window_ids`` (B,) int64 names the windows; it is empty for the filler that keeps ranks in step.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    n_labels: int
    window_ids: NDArray[np.int64]


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of an optimiser step, the position after it, and how many windows all ranks see in it."""

    micro_batches: tuple[MicroBatch, ...]
    after: Position
    n_windows: int


class Loader:
    """Deals windows out to steps, ranks and micro-batches.

    A step is ``micro_batch_size * grad_accum_steps * world_size`` windows; the last of an epoch is smaller rather than
    dropped, and never reaches into the next epoch. In each step all ranks have the same number of micro-batches, at
    least one, because collective operations wait for every rank; a rank with no window left gets a filler without
    any label that counts.
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
        ahead: int = 2,
        workers: int = 1,
        pins: bool = False,
    ) -> None:
        """``workers`` threads keep ``ahead`` steps ready before they are asked for; 0 makes each when it is asked for.

        Neither changes what the steps hold, nor a position: that of a step is where it stands in the order. With
        ``pins`` they lie in memory that a GPU reads by itself: sending them there waits for nothing.

        Raises:
            ConfigError: a size is below 1, or the rank lies outside the world.
            CorpusError: there is no window.
        """
        for name, value in (
            ("micro_batch_size", micro_batch_size),
            ("grad_accum_steps", grad_accum_steps),
            ("world_size", world_size),
            ("workers", workers),
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
        self.ahead, self.workers, self.pins = ahead, workers, pins

    @property
    def windows_per_step(self) -> int:
        """Windows that all ranks together see in a full step."""
        return self.micro_batch_size * self.grad_accum_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps from the start of an epoch to its end, the smaller last one included."""
        return -(-len(self.windows) // self.windows_per_step)

    def order(self, epoch: int, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Return places ``start`` to ``stop`` (by default all) of the order of ``epoch``; the same on every rank."""
        stop = len(self.windows) if stop is None else stop
        if not self.shuffle:
            return np.arange(start, stop, dtype=np.int64)
        return permuted(len(self.windows), start, stop, self.seed, "epoch", epoch)

    def steps(self, position: Position | None = None) -> Iterator[StepBatch]:
        """Return this rank's steps from ``position`` (by default the very start) on, epoch after epoch, endlessly.

        Raises:
            TrainingError: no run over these windows can have been at ``position``.
        """
        position = position or Position()
        if position.epoch < 0 or not 0 <= position.window <= len(self.windows):
            raise TrainingError(
                f"cannot go on at window {position.window} of epoch {position.epoch}: the corpus has "
                f"{len(self.windows)} windows. Resume with the data, tokenizer and max_length the run was started with."
            )
        return prefetched(self._step, self._walk(position), ahead=self.ahead, threads=self.workers)

    def _walk(self, position: Position) -> Iterator[tuple[Position, int]]:
        """Yield where each step starts and the place in its epoch where it ends."""
        n = len(self.windows)
        epoch, start = (position.epoch, position.window) if position.window < n else (position.epoch + 1, 0)
        while True:
            stop = min(start + self.windows_per_step, n)
            yield Position(epoch, start), stop
            epoch, start = (epoch, stop) if stop < n else (epoch + 1, 0)

    def _step(self, piece: tuple[Position, int]) -> StepBatch:
        at, stop = piece
        dealt = self.order(at.epoch, at.window, stop)
        after = Position(at.epoch, stop) if stop < len(self.windows) else Position(at.epoch + 1, 0)
        return StepBatch(self._micro_batches(dealt), after, len(dealt))

    def _micro_batches(self, dealt: NDArray[np.int64]) -> tuple[MicroBatch, ...]:
        # Dealt like cards, so that in a small step no rank has two windows more than another.
        mine = dealt[self.rank :: self.world_size]
        most = -(-len(dealt) // self.world_size)
        return tuple(
            self._micro_batch(mine[first : first + self.micro_batch_size])
            for first in range(0, most, self.micro_batch_size)
        )

    def _micro_batch(self, window_ids: NDArray[np.int64]) -> MicroBatch:
        if len(window_ids) == 0:
            shape = (1, self.windows.seq_len)
            input_ids = torch.full(shape, self.windows.pad_id, dtype=torch.int64)
            labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        else:
            input_ids, labels = self.windows.batch(window_ids)
        n_labels = int((labels != IGNORE_INDEX).sum())
        if self.pins:
            input_ids, labels = input_ids.pin_memory(), labels.pin_memory()
        return MicroBatch(input_ids, labels, n_labels, window_ids)

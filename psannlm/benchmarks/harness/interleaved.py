"""Named candidates in; what each of their runs gave, made in turns on one clock, and its middle and edges, out."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TypeVar

from psannlm.errors import ConfigError

T = TypeVar("T")
Clock = Callable[[], float]
# What a run may tell while it goes on: units done, units in all.
Count = Callable[[int, int], None]


@dataclass(frozen=True)
class Spread:
    """The middle and the edges of repeated measurements, in their unit."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def as_dict(self) -> dict[str, float]:
        """Return the three numbers as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Progress:
    """Where a benchmark stands: in ``run`` of ``n_runs`` (from 1), with ``done`` of ``total`` units (0: not told).

    ``left_s`` is a guess for all that is to come, or None while there is nothing to guess from.
    """

    candidate: str
    is_warm_up: bool
    run: int
    n_runs: int
    done: int
    total: int
    unit: str
    elapsed_s: float
    left_s: float | None

    def __str__(self) -> str:
        kind = "warm-up, " if self.is_warm_up else ""
        parts = [f"run {self.run} of {self.n_runs} ({kind}{self.candidate})"]
        if self.done:
            rate = f", {self.done / self.elapsed_s:,.1f} {self.unit}/s" if self.elapsed_s > 0 else ""
            parts.append(f"{self.done:,} of {self.total:,} {self.unit}{rate}")
        if self.left_s is not None:
            parts.append(f"about {timedelta(seconds=round(self.left_s))} left")
        return ", ".join(parts)


def _ignore(progress: Progress) -> None:
    pass


def run_interleaved(
    candidates: Mapping[str, Callable[[Count], T]],
    repeats: int,
    *,
    warm_ups: int = 1,
    unit: str = "passes",
    clock: Clock = time.perf_counter,
    on_progress: Callable[[Progress], None] = _ignore,
    deadline: float | None = None,
    cold: Collection[str] = (),
    on_result: Callable[[str, bool, T], None] = lambda name, is_warm_up, result: None,
) -> dict[str, list[T]]:
    """Run the candidates A B A B ..., and return what each one's counted runs gave, in the order they were made.

    A machine that slows down or speeds up meanwhile does so for all of them. Rubbish of one candidate is collected
    before the next begins.

    Args:
        candidates: each called with a :data:`Count` that it may tell its progress to.
        repeats: counted runs of each.
        warm_ups: runs of each before them, thrown away.
        unit: what the candidates count.
        on_progress: told at the start of every run and whenever a candidate counts; inside the measured time, so it
            must be quick.
        deadline: a time of ``clock``. Each candidate has one counted run; a further one that would end later, by how
            long the last one took, is left out, and with it all later ones of that candidate.
        cold: candidates without a warm-up.
        on_result: called after every run, outside the measured time, with the name, whether it was a warm-up, and
            what it returned.

    Raises:
        ConfigError: ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ConfigError(f"{repeats} repeats measure nothing; use 1 or more")
    plan = [
        (turn < warm_ups, name)
        for turn in range(warm_ups + repeats)
        for name in candidates
        if turn >= warm_ups or name not in cold
    ]
    left_out: set[str] = set()
    results: dict[str, list[T]] = {name: [] for name in candidates}
    took: dict[str, float] = {}
    for index, (is_warm_up, name) in enumerate(plan):
        if name in left_out or (deadline is not None and results[name] and clock() + took[name] > deadline):
            left_out.add(name)
            continue
        gc.collect()
        run = _Run(plan, index, took, unit, clock, on_progress)
        run.count(0, 0)
        result = candidates[name](run.count)
        took[name] = clock() - run.began
        if not is_warm_up:
            results[name].append(result)
        on_result(name, is_warm_up, result)
    return results


class _Run:
    """One run of one candidate; turns its counts into a :class:`Progress`."""

    def __init__(
        self,
        plan: Sequence[tuple[bool, str]],
        index: int,
        took: Mapping[str, float],
        unit: str,
        clock: Clock,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._plan, self._index, self._took, self._unit = plan, index, took, unit
        self._clock, self._on_progress = clock, on_progress
        self.began = clock()

    def count(self, done: int, total: int) -> None:
        is_warm_up, name = self._plan[self._index]
        elapsed = self._clock() - self.began
        left = self._left(name, elapsed, done, total)
        number, n_runs = self._index + 1, len(self._plan)
        self._on_progress(Progress(name, is_warm_up, number, n_runs, done, total, self._unit, elapsed, left))

    def _left(self, name: str, elapsed: float, done: int, total: int) -> float | None:
        """Each candidate takes what it took last; one that has not run yet, what the slowest of the others took."""
        this = elapsed * total / done if done else self._took.get(name)
        if this is None:
            return None
        known = {**self._took, name: this}
        slowest = max(known.values())
        return max(0.0, this - elapsed) + sum(known.get(later, slowest) for _, later in self._plan[self._index + 1 :])


def timed(work: Callable[[], object], passes: int = 1, *, clock: Clock = time.perf_counter) -> Callable[[Count], float]:
    """Return a candidate that does ``work`` so many times and gives the seconds that one pass took."""

    def run(count: Count) -> float:
        began = clock()
        for done in range(1, passes + 1):
            work()
            count(done, passes)
        return (clock() - began) / passes

    return run


def passes_for(work: Callable[[], object], at_least_s: float, *, clock: Clock = time.perf_counter) -> int:
    """Return how many passes of ``work`` take ``at_least_s``: a run much shorter measures the clock and the system.

    Works once to warm up and once to measure.
    """
    work()
    began = clock()
    work()
    seconds = clock() - began
    return max(1, math.ceil(at_least_s / seconds)) if seconds > 0 else 1


def shared_turns(first: Sequence[float], second: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Return the results of the turns in which both candidates ran: the earliest ones, where a deadline ended one."""
    n_turns = min(len(first), len(second))
    return first[:n_turns], second[:n_turns]


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Return the spread of ``above / below``, each run against the other's of the same turn."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])

"""Interleaved timing of benchmark candidates (A B A B ...), with progress events, a time limit and medians."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from psannlm.errors import ConfigError
from psannlm.reports.schemas.measured import Spread
from psannlm.runtime.progress import OnProgress, Progress, ignore_progress
from psannlm.runtime.signals import delaying_interrupt

T = TypeVar("T")
Clock = Callable[[], float]
# How a run reports progress: units done, units in total.
Count = Callable[[int, int], None]


@dataclass(frozen=True)
class RunProgress(Progress):
    """Progress of a benchmark: run ``run`` of ``n_runs`` (from 1), of ``candidate``.

    ``done`` and ``elapsed_s`` are of this run. ``left_s`` estimates the seconds of all remaining runs; None while there
    is nothing to estimate from, or once the deadline has passed.
    """

    candidate: str = ""
    is_warm_up: bool = False
    run: int = 1
    n_runs: int = 1

    def __str__(self) -> str:
        kind = "warm-up, " if self.is_warm_up else ""
        return ", ".join([f"run {self.run} of {self.n_runs} ({kind}{self.candidate})", *self.figures()])


def run_interleaved(
    candidates: Mapping[str, Callable[[Count], T]],
    repeats: int,
    *,
    warm_ups: int = 1,
    unit: str = "passes",
    clock: Clock = time.perf_counter,
    on_progress: OnProgress = ignore_progress,
    deadline: float | None = None,
    cold: Collection[str] = (),
    on_result: Callable[[str, bool, T], None] = lambda name, is_warm_up, result: None,
) -> dict[str, list[T]]:
    """Run the candidates A B A B ... and return the results of each one's counted runs, in order.

    A machine that slows down or speeds up meanwhile affects all candidates alike. ``gc.collect()`` runs between runs.

    Args:
        candidates: each is called with a :data:`Count`, to which it may report its progress.
        repeats: counted runs of each candidate.
        warm_ups: runs of each candidate before the counted ones; their results are discarded.
        unit: what the candidates count.
        on_progress: called with a :class:`RunProgress` at the start of every run and whenever a candidate counts. It is
            inside the measured time and must be quick.
        deadline: a time of ``clock``. Each candidate has at least one counted run. A further run that would end after
            the deadline, estimated by the candidate's last run, is left out, with all later ones of that candidate.
        cold: candidates without a warm-up.
        on_result: called after every run, outside the measured time, with the name, whether it was a warm-up, and
            the result.

    Raises:
        ConfigError: ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}; use 1 or more")
    plan = [
        (round_ < warm_ups, name)
        for round_ in range(warm_ups + repeats)
        for name in candidates
        if round_ >= warm_ups or name not in cold
    ]
    runs: _Runs[T] = _Runs(plan, unit, clock, on_progress, deadline)
    for index, (is_warm_up, name) in enumerate(plan):
        if runs.is_left_out(name):
            continue
        with delaying_interrupt():
            gc.collect()
        result = runs.run(index, candidates[name])
        on_result(name, is_warm_up, result)
    return {name: runs.results.get(name, []) for name in candidates}


@dataclass
class _Runs(Generic[T]):
    """The runs of :func:`run_interleaved`: results and seconds so far, and the estimate of the remaining time."""

    plan: Sequence[tuple[bool, str]]
    unit: str
    clock: Clock
    on_progress: OnProgress
    deadline: float | None
    results: dict[str, list[T]] = field(default_factory=dict)
    # Seconds of each candidate's last run.
    last_s: dict[str, float] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)

    def is_left_out(self, name: str) -> bool:
        """Whether the next run of ``name`` is left out, because it would end after the deadline."""
        is_late = (
            self.deadline is not None and name in self.results and self.clock() + self.last_s[name] > self.deadline
        )
        if is_late:
            self.left_out.add(name)
        return name in self.left_out

    def run(self, index: int, candidate: Callable[[Count], T]) -> T:
        """Make the run at ``index`` of the plan, report its progress, and record its result unless it is a warm-up."""
        is_warm_up, name = self.plan[index]
        began = self.clock()

        def count(done: int, total: int) -> None:
            now = self.clock()
            left_s = self._left_s(index, began, now, done, total)
            figures = ("measuring", done, total, self.unit, now - began, left_s, "", False)
            self.on_progress(RunProgress(*figures, name, is_warm_up, index + 1, len(self.plan)))

        count(0, 0)
        result = candidate(count)
        self.last_s[name] = self.clock() - began
        if not is_warm_up:
            self.results.setdefault(name, []).append(result)
        return result

    def _left_s(self, index: int, began: float, now: float, done: int, total: int) -> float | None:
        """Estimate the seconds until the last run ends, without the runs that the deadline will leave out.

        Each candidate takes as long as its last run; one that has not run yet, as long as the slowest of the others.
        """
        is_warm_up, name = self.plan[index]
        this_s = (now - began) * total / done if done else self.last_s.get(name)
        if this_s is None:
            return None
        known = {**self.last_s, name: this_s}
        slowest = max(known.values())
        end = max(now, began + this_s)
        counted, left_out = set(self.results), set(self.left_out)
        counted |= set() if is_warm_up else {name}
        for is_later_warm_up, later in self.plan[index + 1 :]:
            seconds = known.get(later, slowest)
            if self.deadline is not None and later in counted and end + seconds > self.deadline:
                left_out.add(later)
            if later not in left_out:
                end += seconds
                counted |= set() if is_later_warm_up else {later}
        if self.deadline is None:
            return end - now
        # Runs that are made in any case may end after the deadline; the limit is still what the user was promised.
        return min(end, self.deadline) - now if now < self.deadline else None


def timed(work: Callable[[], object], passes: int = 1, *, clock: Clock = time.perf_counter) -> Callable[[Count], float]:
    """Return a candidate that calls ``work`` ``passes`` times and returns the seconds of one pass."""

    def run(count: Count) -> float:
        began = clock()
        for done in range(1, passes + 1):
            work()
            count(done, passes)
        return (clock() - began) / passes

    return run


def passes_for(work: Callable[[], object], at_least_s: float, *, clock: Clock = time.perf_counter) -> int:
    """Return how many passes of ``work`` take ``at_least_s``: a much shorter run measures the clock and the system.

    Calls ``work`` once to warm up and once to measure.
    """
    work()
    began = clock()
    work()
    seconds = clock() - began
    return max(1, math.ceil(at_least_s / seconds)) if seconds > 0 else 1


def shared_rounds(first: Sequence[float], second: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Return the results of the rounds that both candidates ran: the earliest ones, if a deadline left some out."""
    n_rounds = min(len(first), len(second))
    return first[:n_rounds], second[:n_rounds]


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Return the spread of ``above / below``, each run divided by the other candidate's run of the same round."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])

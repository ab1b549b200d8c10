"""Progress event: how much of some long work is done, how fast it goes, and how long the rest will take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True)
class Progress:
    """Progress of ``what``: ``done`` of ``total`` units; its text is the line that a command shows.

    Attributes:
        what: the work, such as "writing shards".
        done: units done so far.
        total: units in all; None or 0: unknown.
        unit: what is counted, in the plural; ``bytes`` are shown in MB.
        elapsed_s: seconds since the count began.
        left_s: estimated seconds until the work is done; None: unknown.
        detail: a further figure.
        is_bound: whether ``left_s`` is a maximum.
    """

    what: str
    done: int = 0
    total: int | None = None
    unit: str = ""
    elapsed_s: float = 0.0
    left_s: float | None = None
    detail: str = ""
    is_bound: bool = False

    def __str__(self) -> str:
        figures = ", ".join(self.figures())
        return f"{self.what}: {figures}" if figures else self.what

    def figures(self) -> list[str]:
        """Return the known ones of count, throughput, detail and time left."""
        unit, scale, digits = ("MB", 1e6, 1) if self.unit == "bytes" else (self.unit, 1, 0)
        known = []
        if self.done:
            of = f" of {self.total / scale:,.{digits}f}" if self.total else ""
            known.append(f"{self.done / scale:,.{digits}f}{of} {unit}")
            if self.elapsed_s > 0:
                known.append(f"{self.done / scale / self.elapsed_s:,.1f} {unit}/s")
        if self.detail:
            known.append(self.detail)
        if self.left_s is not None:
            seconds = math.ceil(self.left_s) if self.is_bound else round(self.left_s)
            known.append(f"{'at most' if self.is_bound else 'about'} {timedelta(seconds=seconds)} left")
        return known


OnProgress = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """Receive progress, and do nothing."""


class ProgressCounter:
    """Reports what is done of ``what`` in ``unit``, with the seconds since construction and those left."""

    def __init__(self, on_progress: OnProgress, what: str, unit: str, total: int | None = None) -> None:
        self._on_progress, self._what, self._unit, self._total = on_progress, what, unit, total
        self._began, self._done = time.monotonic(), 0

    def add(self, n: int) -> None:
        """Report that ``n`` more units are done."""
        self.at(self._done + n)

    def at(self, done: int, detail: str = "") -> None:
        """Report that ``done`` units are done."""
        self._done, elapsed_s = done, time.monotonic() - self._began
        left_s = elapsed_s * (self._total - done) / done if self._total is not None and done else None
        self._on_progress(Progress(self._what, done, self._total, self._unit, elapsed_s, left_s, detail))

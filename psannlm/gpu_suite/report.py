"""What the checks of a GPU measured in; each value beside its limit, a verdict, and plain data for a file, out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Side = Literal["at most", "at least"]
Status = Literal["ok", "failed", "error", "skipped"]


@dataclass(frozen=True)
class Measure:
    """One measured value and the limit that it is held against.

    Attributes:
        name: unique within its check, and the same whatever is measured: a baseline is compared by it.
        value: in ``unit``; one that is not finite misses every limit.
        side: whether the limit is the highest or the lowest value that passes.
        reason: why the limit stands where it does.
        regression: how much worse than in an earlier battery the value may be, as a share of the earlier one; None: the
            limit alone counts, because the value moves from run to run by more than it means.
        spread: lowest and highest of the measurements behind the value, or None for a single one.
        detail: what was found, for people: where two texts part, which tensors differ.
    """

    name: str
    value: float
    unit: str
    side: Side
    limit: float
    reason: str
    regression: float | None = None
    spread: tuple[float, float] | None = None
    detail: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the value keeps to its limit."""
        if not math.isfinite(self.value):
            return False
        return self.value <= self.limit if self.side == "at most" else self.value >= self.limit

    def __str__(self) -> str:
        found = f": {self.detail}" if self.detail else ""
        return f"{self.name}: {self.value:.4g} {self.unit} ({self.side} {self.limit:.4g}){found}"

    def as_dict(self) -> dict[str, Any]:
        """Return every field and the verdict as plain data; a value that is not finite becomes a word."""
        plain = asdict(self)
        plain["value"] = self.value if math.isfinite(self.value) else str(self.value)
        return {**plain, "is_met": self.is_met}


@dataclass(frozen=True)
class CheckResult:
    """What came of one check.

    Attributes:
        check: its number, such as ``GPU-03``.
        measures: what was measured, each against its limit.
        skipped: why nothing was measured, in words; None: something was.
        error: what kept the check from its end; None: nothing did.
        notes: what a reader must know to read the figures.
        series: curves for the plots: name to values.
        seconds: that the check took.
    """

    check: str
    title: str
    measures: tuple[Measure, ...] = ()
    skipped: str | None = None
    error: str | None = None
    notes: tuple[str, ...] = ()
    series: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def missed(self) -> tuple[Measure, ...]:
        """The measures that missed their limits."""
        return tuple(measure for measure in self.measures if not measure.is_met)

    @property
    def status(self) -> Status:
        """A check without a measure and without a reason for that is an error: it must not pass for ok."""
        if self.error is not None:
            return "error"
        if self.skipped is not None:
            return "skipped"
        if not self.measures:
            return "error"
        return "failed" if self.missed else "ok"

    def problems(self) -> list[str]:
        """Return one line for each reason why the check failed."""
        if self.error is not None:
            return [f"{self.check}: {self.error}"]
        if self.status == "error":
            return [f"{self.check}: nothing was measured"]
        return [f"{self.check}: {measure}" for measure in self.missed]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "check": self.check,
            "title": self.title,
            "status": self.status,
            "skipped": self.skipped,
            "error": self.error,
            "seconds": round(self.seconds, 3),
            "measures": [measure.as_dict() for measure in self.measures],
            "notes": list(self.notes),
            "series": self.series,
        }


@dataclass(frozen=True)
class SuiteReport:
    """All checks that ran, on what, and how they compare with an earlier battery.

    Attributes:
        machine: what decides the figures: device, its name, how many, versions, precision settings.
        is_dry_run: whether sizes were small and rates held against nothing.
        baseline: path of the earlier summary, or None.
        regressions: one line for each value that is worse than there by more than its tolerance.
        to_come: the checks that have not run yet; none at the end of a battery.
    """

    machine: dict[str, Any]
    is_dry_run: bool
    results: tuple[CheckResult, ...]
    baseline: str | None = None
    regressions: tuple[str, ...] = ()
    to_come: tuple[str, ...] = ()

    @property
    def problems(self) -> list[str]:
        """One line for each limit missed, check broken, and regression."""
        return [line for result in self.results for line in result.problems()] + list(self.regressions)

    @property
    def verdict(self) -> Literal["ok", "failed", "unfinished"]:
        """``ok`` when all ran and nothing failed; checks that were skipped are named beside it."""
        if self.to_come:
            return "unfinished"
        return "failed" if self.problems else "ok"

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        counts = {status: sum(r.status == status for r in self.results) for status in ("ok", "failed", "error")}
        return {
            "verdict": self.verdict,
            "counts": {**counts, "skipped": sum(r.status == "skipped" for r in self.results)},
            "is_dry_run": self.is_dry_run,
            "machine": self.machine,
            "problems": self.problems,
            "to_come": list(self.to_come),
            "baseline": self.baseline,
            "regressions": list(self.regressions),
            "checks": [result.as_dict() for result in self.results],
        }


def at_most(name: str, value: float, limit: float, unit: str, reason: str, **more: Any) -> Measure:
    """Return a measure whose limit is the highest value that passes."""
    return Measure(name, float(value), unit, "at most", limit, reason, **more)


def at_least(name: str, value: float, limit: float, unit: str, reason: str, **more: Any) -> Measure:
    """Return a measure whose limit is the lowest value that passes."""
    return Measure(name, float(value), unit, "at least", limit, reason, **more)


def none_of(name: str, found: Sequence[object] | int, unit: str, reason: str, **more: Any) -> Measure:
    """Return a measure of things of which there must be none."""
    count = found if isinstance(found, int) else len(found)
    return at_most(name, count, 0, unit, reason, **more)


def largest(values: Iterable[float]) -> float:
    """Return the largest of ``values``; NaN where one of them is NaN, wherever it stands, and where there is none.

    The built-in ``max`` keeps to the number before a NaN, for no comparison with a NaN is true.
    """
    found = list(values)
    return math.nan if not found or any(map(math.isnan, found)) else max(found)


def largest_distance(a: Iterable[float], b: Iterable[float]) -> float:
    """Return how far two curves of the same length are apart where they are furthest; NaN as :func:`largest`."""
    return largest(abs(x - y) for x, y in zip(a, b, strict=True))

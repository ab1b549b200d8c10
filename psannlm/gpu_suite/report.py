"""Results of the GPU validation suite: measured values, their limits, verdicts and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Side = Literal["at most", "at least"]
Status = Literal["ok", "failed", "error", "skipped"]


@dataclass(frozen=True)
class Measure:
    """A measured value and its limit.

    Attributes:
        name: unique within its check and independent of the result; baselines are compared by name.
        value: in ``unit``; a non-finite value misses every limit.
        side: whether the limit is the highest or the lowest value that passes.
        reason: why the limit is what it is.
        regression: how much worse than in an earlier run the value may be, as a fraction of the earlier value; None:
            only the limit counts, because the value varies too much between runs.
        spread: minimum and maximum of the measurements whose median is the value; None for a single one.
        detail: human-readable detail, such as the tensors that differ.
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
        """Whether the value meets its limit."""
        if not math.isfinite(self.value):
            return False
        return self.value <= self.limit if self.side == "at most" else self.value >= self.limit

    def __str__(self) -> str:
        found = f": {self.detail}" if self.detail else ""
        return f"{self.name}: {self.value:.4g} {self.unit} ({self.side} {self.limit:.4g}){found}"

    def as_dict(self) -> dict[str, Any]:
        """Return every field and the verdict as plain data; a non-finite value becomes a string."""
        plain = asdict(self)
        plain["value"] = self.value if math.isfinite(self.value) else str(self.value)
        return {**plain, "is_met": self.is_met}


@dataclass(frozen=True)
class CheckResult:
    """Result of one check.

    Attributes:
        check: number of the check, such as ``GPU-03``.
        measures: the measured values and their limits.
        skipped: why the check was skipped, or None.
        error: why the check could not finish, or None.
        notes: explanations of the figures.
        series: curves for the plots, by name.
        seconds: duration of the check.
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
        """The measures that miss their limits."""
        return tuple(measure for measure in self.measures if not measure.is_met)

    @property
    def status(self) -> Status:
        """Status of the check; one without measures that was not skipped is an error, never ok."""
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
    """Results of all checks that ran, the machine, and the comparison with an earlier run.

    Attributes:
        machine: what determines the figures: device, name and number of devices, versions, precision settings.
        is_dry_run: whether sizes were small and no throughput limit applied.
        baseline: path of the earlier summary, or None.
        regressions: one line for each value that is worse than in the baseline by more than its tolerance.
        to_come: the checks that have not run yet; empty at the end.
    """

    machine: dict[str, Any]
    is_dry_run: bool
    results: tuple[CheckResult, ...]
    baseline: str | None = None
    regressions: tuple[str, ...] = ()
    to_come: tuple[str, ...] = ()

    @property
    def problems(self) -> list[str]:
        """One line for each missed limit, failed check and regression."""
        return [line for result in self.results for line in result.problems()] + list(self.regressions)

    @property
    def verdict(self) -> Literal["ok", "failed", "unfinished"]:
        """``ok`` if all checks ran or were skipped and nothing failed."""
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
    """Return a measure of a count that must be 0."""
    count = found if isinstance(found, int) else len(found)
    return at_most(name, count, 0, unit, reason, **more)


def largest(values: Iterable[float]) -> float:
    """Return the largest of ``values``; NaN if one of them is NaN or there are none.

    The built-in ``max`` may ignore a NaN, because no comparison with it is true.
    """
    found = list(values)
    return math.nan if not found or any(map(math.isnan, found)) else max(found)


def largest_distance(a: Iterable[float], b: Iterable[float]) -> float:
    """Return the largest distance between two curves of the same length; NaN as :func:`largest`."""
    return largest(abs(x - y) for x, y in zip(a, b, strict=True))

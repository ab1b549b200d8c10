"""Schema of a GPU validation (``reports/gpu/<ts>/summary.json``): measured values, limits and verdicts."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, PlainSerializer, PlainValidator, computed_field
from pydantic.dataclasses import dataclass
from typing_extensions import Required, TypedDict

from psannlm.io.artifact_schema import Figure, Figures, Flag, OptionalFigure, Whole, figure

Side = Literal["at most", "at least"]
Status = Literal["ok", "failed", "error", "skipped"]
_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _value(value: object) -> float:
    return _WORDS[value] if isinstance(value, str) and value in _WORDS else figure(value, is_finite=False)


# A non-finite value is written as a word.
Value = Annotated[
    float, PlainValidator(_value), PlainSerializer(lambda value: value if math.isfinite(value) else str(value))
]
Seconds = Annotated[Figure, PlainSerializer(lambda seconds: round(seconds, 3))]


class GpuMachine(TypedDict, total=False):
    """What determines the figures: hardware, versions, and float32 matrix precision."""

    device: Required[str]
    name: Required[str]
    n_devices: Required[Whole]
    torch: Required[str]
    threads: Whole | None
    cuda: str | None
    float32_matmul_precision: str
    tf32_in_matmul: Flag
    tf32_in_cudnn: Flag
    memory_bytes: Whole
    compute_capability: str


@dataclass(frozen=True)
class Measure(Figures):
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
    value: Value
    unit: str
    side: Side
    limit: Figure
    reason: str
    regression: OptionalFigure = None
    spread: tuple[OptionalFigure, OptionalFigure] | None = None
    detail: str = ""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def is_met(self) -> bool:
        """Whether the value meets its limit."""
        if not math.isfinite(self.value):
            return False
        return self.value <= self.limit if self.side == "at most" else self.value >= self.limit

    def __str__(self) -> str:
        found = f": {self.detail}" if self.detail else ""
        return f"{self.name}: {self.value:.4g} {self.unit} ({self.side} {self.limit:.4g}){found}"


@dataclass(frozen=True)
class CheckResult(Figures):
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
    series: dict[str, list[Figure]] = field(default_factory=dict)
    seconds: Seconds = 0.0

    @property
    def missed(self) -> tuple[Measure, ...]:
        """The measures that miss their limits."""
        return tuple(measure for measure in self.measures if not measure.is_met)

    @computed_field  # type: ignore[prop-decorator]
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


@dataclass(frozen=True)
class SuiteReport(Figures):
    """Results of all checks that ran, the machine, and the comparison with an earlier run.

    Verdicts follow from the values and limits; those that a file states are not read.

    Attributes:
        is_dry_run: whether sizes were small and no throughput limit applied.
        baseline: path of the earlier summary, or None.
        regressions: one line for each value that is worse than in the baseline by more than its tolerance.
        to_come: the checks that have not run yet; empty at the end.
    """

    machine: GpuMachine
    is_dry_run: Annotated[Flag, Field(validation_alias=AliasChoices("is_dry_run", "is_rehearsal"))]
    checks: tuple[CheckResult, ...]
    baseline: str | None = None
    regressions: tuple[str, ...] = ()
    to_come: tuple[str, ...] = ()

    @computed_field  # type: ignore[prop-decorator]
    @property
    def problems(self) -> list[str]:
        """One line for each missed limit, failed check and regression."""
        return [line for check in self.checks for line in check.problems()] + list(self.regressions)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Literal["ok", "failed", "unfinished"]:
        """``ok`` if all checks ran or were skipped and nothing failed."""
        if self.to_come:
            return "unfinished"
        return "failed" if self.problems else "ok"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def counts(self) -> dict[Status, int]:
        """How many checks have each status."""
        statuses: tuple[Status, ...] = ("ok", "failed", "error", "skipped")
        return {status: sum(check.status == status for check in self.checks) for status in statuses}

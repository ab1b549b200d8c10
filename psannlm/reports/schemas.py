"""Schemas of figures that reports read: ``summary.json`` of gpu-validate and ``metrics.json`` of bench-train.

A figure is None where it was NaN or infinite, which JSON cannot express. Unknown keys are ignored, so that files of
later versions remain readable; former names of keys are aliases.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from psannlm.io.readers import Unreadable

Schema = TypeVar("Schema", bound="Figures")
# Strict: text and booleans are not figures. A whole number stays one.
Number = Annotated[int, Field(strict=True)] | Annotated[float, Field(strict=True)]


class Figures(BaseModel):
    """Base of all schemas."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class GpuMachine(Figures):
    """Machine of a GPU validation."""

    name: str
    n_devices: int
    torch: str


class GpuMeasure(Figures):
    """One value of a check with its limit."""

    name: str
    # A value that is not finite is written as a word.
    value: Number | Literal["nan", "inf", "-inf"] | None
    limit: Number | None
    side: str
    unit: str
    is_met: bool
    reason: str
    # Not in earlier summaries.
    detail: str = ""
    spread: tuple[Number | None, Number | None] | None = None


class GpuCheck(Figures):
    """One check: verdict, values and notes."""

    check: str
    title: str
    status: str
    seconds: Number | None
    skipped: str | None
    error: str | None
    measures: list[GpuMeasure]
    notes: list[str]


class GpuSummary(Figures):
    """``reports/gpu/<ts>/summary.json``."""

    verdict: str
    is_dry_run: bool = Field(validation_alias=AliasChoices("is_dry_run", "is_rehearsal"))
    machine: GpuMachine
    baseline: str | None
    regressions: list[str]
    checks: list[GpuCheck]


class Spread(Figures):
    """Median, lowest and highest of repeated measurements."""

    median: Number | None
    lowest: Number | None
    highest: Number | None


class ThroughputRow(Figures):
    """One candidate of a training benchmark. Times are in seconds, losses in nats per token."""

    name: str
    tokens_per_s: Number | None
    tokens_per_s_lowest: Number | None
    tokens_per_s_highest: Number | None
    ours_over_it: Spread
    utilisation: Number | None
    step_s: Number | None
    first_step_s: Number | None
    peak_bytes: Number | None
    parameters: int
    first_loss: Number | None
    last_loss: Number | None


class ThroughputMetrics(Figures):
    """``reports/throughput/<ts>/metrics.json``."""

    batch_tokens: int
    seq_len: int
    precision: str
    rows: list[ThroughputRow]
    problems: list[str]


def read_figures(schema: type[Schema], figures: dict[str, Any]) -> Schema:
    """Return the figures of a file as ``schema``.

    Raises:
        Unreadable: they do not fit; the message names the first key that does not, and how many others.
    """
    try:
        return schema.model_validate(figures)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        key = ".".join(str(part) for part in first["loc"])
        more = f" and {len(others):,} more problems" if others else ""
        raise Unreadable(f"{key}: {first['msg'].lower()}{more}") from error

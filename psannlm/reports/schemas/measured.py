"""Schemas of repeated measurements: spread over runs, mean over seeds, and paired differences."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from psannlm.io.artifact_schema import Figure, Figures, OptionalFigure, Whole


@dataclass(frozen=True)
class Spread(Figures):
    """Median, minimum and maximum of repeated measurements, in the unit of the measurements."""

    median: Figure
    lowest: Figure
    highest: Figure

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Mean(Figures):
    """Mean, sample standard deviation (None for a single value), minimum and maximum of ``n`` values."""

    mean: Figure
    std: OptionalFigure
    lowest: Figure
    highest: Figure
    n: Whole

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Return the mean of at least one value."""
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, min(values), max(values), len(values))


@dataclass(frozen=True)
class PairedDifference(Figures):
    """Mean over ``n`` pairs of a value minus the baseline's, with its 95% interval (None for a single pair)."""

    mean: Figure
    std: OptionalFigure
    low: OptionalFigure
    high: OptionalFigure
    n: Whole
    baseline_mean: Figure

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends of the interval."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def fraction(self) -> float:
        """The difference over the baseline's mean; NaN where that is zero."""
        return self.mean / self.baseline_mean if self.baseline_mean else float("nan")


@dataclass(frozen=True, kw_only=True)
class PooledDifference(Figures):
    """Difference of two means with the interval and p-value of a variance pooled over the arms of a study.

    ``std`` is the pooled standard deviation of one value, with ``degrees`` of freedom; ``p`` is two-sided, ``p_holm``
    adjusted for the number of comparisons. ``low_of_all`` to ``high_of_all``: with those of all other comparisons it
    holds at 95 % together (Bonferroni).
    """

    mean: Figure
    std: Figure
    degrees: Whole
    low: Figure
    high: Figure
    p: Figure
    p_holm: OptionalFigure = None
    low_of_all: OptionalFigure = None
    high_of_all: OptionalFigure = None


@dataclass(frozen=True, kw_only=True)
class TokenRatio(Figures):
    """Tokens that another variant needs for this variant's loss, over this variant's tokens.

    Attributes:
        ratio: the ratio, read on the other's loss curve; a bound where that is outside the curve.
        outside: ``above`` if the other's curve does not reach the loss (the ratio is larger than ``ratio``), ``below``
            if its first validation is lower already (smaller than ``ratio``), else empty.
        own_ratio: with ``above``, the other's tokens over those at which this variant reached the other's last loss,
            read on this variant's curve; None if that is outside the curve too.
    """

    ratio: Figure
    outside: str = ""
    own_ratio: OptionalFigure = None


@dataclass(frozen=True, kw_only=True)
class BootstrapDifference(Figures):
    """Difference in nats per token with its 95% bootstrap interval over ``n_documents`` (None for fewer than two)."""

    mean: Figure
    low: OptionalFigure
    high: OptionalFigure
    n_documents: Whole
    n_resamples: Whole
    seed: Whole

"""Confidence intervals by Student's t, pooled variances, and Holm's correction for several comparisons."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_CONFIDENCE = 0.95


def interval_half_width(std: float, n: int) -> float:
    """Return half the width of the 95% interval of the mean of ``n`` > 1 values with sample standard deviation ``std``.

    t(0.975, n - 1) · s / √n, for values that are about normal.
    """
    return student_t_quantile(0.5 + _CONFIDENCE / 2, n - 1) * std / math.sqrt(n)


def student_t_quantile(probability: float, degrees: int) -> float:
    """Return the value below which Student's t with whole ``degrees`` of freedom lies with ``probability`` above 0.5.

    Raises:
        ValueError: ``degrees`` is below 1, or ``probability`` not between 0.5 and 1.
    """
    if degrees < 1 or not 0.5 < probability < 1:
        raise ValueError(f"{degrees} degrees of freedom, probability {probability}")
    low, high = 0.0, 1.0
    while student_t_cdf(high, degrees) < probability:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if student_t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def student_t_cdf(t: float, degrees: int) -> float:
    """Return P(T ≤ t) for t ≥ 0 by the finite series (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(angle)
    is_odd = degrees % 2
    term = cosine if is_odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if is_odd else 2, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    inner = math.sin(angle) * total
    within = 2 / math.pi * (angle + inner) if is_odd else inner
    return 0.5 + within / 2


@dataclass(frozen=True)
class Pool:
    """Variance within groups that are taken to share one, and its degrees of freedom."""

    variance: float
    degrees: int


def pool_variance(groups: Iterable[Sequence[float]]) -> Pool | None:
    """Return the pooled variance Σ (n - 1) s² / Σ (n - 1) over ``groups``; None if no group has two values.

    It assumes one true variance for all groups, which makes intervals of few values per group narrower and steadier
    than each group's own variance does.
    """
    several = [group for group in groups if len(group) > 1]
    degrees = sum(len(group) - 1 for group in several)
    if not degrees:
        return None
    return Pool(sum((len(group) - 1) * statistics.variance(group) for group in several) / degrees, degrees)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for their number by Holm's step-down method (1979), in the given order.

    With p₁ ≤ … ≤ pₘ the k-th becomes the largest (m - j + 1) · pⱼ over j ≤ k, at most 1. Rejecting where the adjusted
    value is at most α keeps the probability of any false rejection at or below α, however the tests depend on each
    other.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = largest
    return adjusted

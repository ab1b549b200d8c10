"""Paired differences with confidence intervals by Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from psannlm.reports.schemas.measured import Mean, PairedDifference

_CONFIDENCE = 0.95


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> PairedDifference | None:
    """Return the difference over the keys (seeds) that both have, or None if they share none.

    The interval is that of Student's paired t (1908): mean ± t(0.975, n - 1) · s / √n, where s is the sample standard
    deviation of the differences. It assumes that these are about normal, which a few seeds cannot show.
    """
    keys = sorted(values.keys() & baseline.keys())
    if not keys:
        return None
    found = Mean.of([values[key] - baseline[key] for key in keys])
    half = None
    if found.std is not None:
        half = student_t_quantile(0.5 + _CONFIDENCE / 2, found.n - 1) * found.std / math.sqrt(found.n)
    return PairedDifference(
        mean=found.mean,
        std=found.std,
        low=None if half is None else found.mean - half,
        high=None if half is None else found.mean + half,
        n=found.n,
        baseline_mean=statistics.fmean(baseline[key] for key in keys),
    )


def student_t_quantile(probability: float, degrees: int) -> float:
    """Return the value below which Student's t with whole ``degrees`` of freedom lies with ``probability`` above 0.5.

    Raises:
        ValueError: ``degrees`` is below 1, or ``probability`` not between 0.5 and 1.
    """
    if degrees < 1 or not 0.5 < probability < 1:
        raise ValueError(f"{degrees} degrees of freedom, probability {probability}")
    low, high = 0.0, 1.0
    while _student_t_cdf(high, degrees) < probability:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _student_t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _student_t_cdf(t: float, degrees: int) -> float:
    """The distribution for t ≥ 0 by its finite series (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
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

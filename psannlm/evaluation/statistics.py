"""Confidence intervals of means by Student's t."""

from __future__ import annotations

import math

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

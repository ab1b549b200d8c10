"""Measures of the GPU validation suite: limits, counts that must be 0, and largest values that keep NaN."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from psannlm.reports.schemas.gpu import Measure


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

"""Paired differences with confidence intervals by Student's t."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from psannlm.evaluation.statistics import interval_half_width
from psannlm.reports.schemas.measured import Mean, PairedDifference


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> PairedDifference | None:
    """Return the difference over the keys (seeds) that both have, or None if they share none.

    The interval is that of Student's paired t (1908): mean ± t(0.975, n - 1) · s / √n, where s is the sample standard
    deviation of the differences. It assumes that these are about normal, which a few seeds cannot show.
    """
    keys = sorted(values.keys() & baseline.keys())
    if not keys:
        return None
    found = Mean.of([values[key] - baseline[key] for key in keys])
    half = None if found.std is None else interval_half_width(found.std, found.n)
    return PairedDifference(
        mean=found.mean,
        std=found.std,
        low=None if half is None else found.mean - half,
        high=None if half is None else found.mean + half,
        n=found.n,
        baseline_mean=statistics.fmean(baseline[key] for key in keys),
    )

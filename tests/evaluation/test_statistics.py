"""Pooled variance and Holm's correction against values computed by hand."""

from __future__ import annotations

import math

import pytest

from psannlm.evaluation.statistics import holm, pool_variance, student_t_cdf


def test_pooled_variance_weights_by_degrees_of_freedom() -> None:
    """Variances 1 (n = 3) and 2 (n = 2): (2 * 1 + 1 * 2) / 3; a single value adds neither variance nor freedom."""
    pool = pool_variance([[1.0, 2.0, 3.0], [2.0, 4.0], [99.0]])
    assert pool is not None
    assert (pool.variance, pool.degrees) == (pytest.approx(4 / 3), 3)
    assert pool_variance([[1.0], [5.0]]) is None


def test_student_t_cdf_matches_closed_form_of_three_degrees() -> None:
    for t in (0.0, 0.3, 1.0, 4.0):
        x = t / math.sqrt(3)
        assert student_t_cdf(t, 3) == pytest.approx(0.5 + (x / (1 + x * x) + math.atan(x)) / math.pi)


def test_holm_adjusts_by_rank_and_never_decreases() -> None:
    """Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, and 0.04 raised to 0.06."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([]) == []

"""Student's t against published tables, and the paired interval against a known value."""

from __future__ import annotations

import pytest

from psannlm.evaluation.statistics import student_t_quantile
from psannlm.experiments.statistics import paired_difference
from psannlm.reports.schemas.measured import Mean


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [
        (1, 12.70620),
        (2, 4.30265),
        (3, 3.18245),
        (4, 2.77645),
        (5, 2.57058),
        (9, 2.26216),
        (30, 2.04227),
        (200, 1.97190),
    ],
)
def test_student_t_quantiles_match_tables(degrees: int, quantile: float) -> None:
    assert student_t_quantile(0.975, degrees) == pytest.approx(quantile, abs=6e-6)


def test_paired_difference_interval_known_value() -> None:
    """Differences -0.10, -0.14, -0.06: mean -0.10, s = 0.04, half width 4.30265 * 0.04 / sqrt(3) = 0.099365."""
    baseline = {1: 3.00, 2: 3.10, 3: 2.90, 9: 99.0}
    found = paired_difference({1: 2.90, 2: 2.96, 3: 2.84, 8: 0.0}, baseline)
    assert found is not None
    assert (found.n, found.baseline_mean) == (3, pytest.approx(3.0))
    assert found.mean == pytest.approx(-0.10)
    assert found.std == pytest.approx(0.04)
    assert (found.low, found.high) == (pytest.approx(-0.199365, abs=1e-6), pytest.approx(-0.000635, abs=1e-6))


def test_paired_difference_of_one_or_no_pair() -> None:
    found = paired_difference({1: 2.5}, {1: 3.0})
    assert found is not None
    assert (found.mean, found.std, found.low, found.high, found.n) == (-0.5, None, None, None, 1)
    assert paired_difference({1: 2.5}, {2: 3.0}) is None


def test_paired_difference_removes_seed_variance() -> None:
    """The seeds lie far apart and the difference does not: unpaired, nothing could be said."""
    found = paired_difference({1: 1.9, 2: 5.9, 3: 9.9}, {1: 2.0, 2: 6.0, 3: 10.0})
    assert found is not None
    assert found.high is not None
    assert found.high < -0.099
    assert Mean.of([1.0, 3.0]).std == pytest.approx(2**0.5)

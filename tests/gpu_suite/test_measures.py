"""Results of the GPU validation suite: limits, verdicts and non-finite values."""

from __future__ import annotations

import json
import math

import pytest

from psannlm.gpu_suite.measures import at_least, at_most, largest, largest_distance, none_of
from psannlm.reports.schemas.gpu import CheckResult, GpuMachine, Measure, SuiteReport

MACHINE: GpuMachine = {"device": "cpu", "name": "CPU", "n_devices": 1, "torch": "2.13.0"}
GOOD = at_most("error", 0.5, 1.0, "x", "because")


@pytest.mark.parametrize(
    ("measure", "is_met"),
    [
        (at_most("a", 1.0, 1.0, "x", ""), True),
        (at_most("a", 1.01, 1.0, "x", ""), False),
        (at_least("a", 1.0, 1.0, "x", ""), True),
        (at_least("a", 0.99, 1.0, "x", ""), False),
        (at_most("a", math.nan, 1.0, "x", ""), False),
        (at_least("a", math.nan, 0.0, "x", ""), False),
        (at_least("a", math.inf, 0.0, "x", ""), False),
        (at_most("a", -math.inf, 1.0, "x", ""), False),
        (none_of("a", [], "x", ""), True),
        (none_of("a", ["one"], "x", ""), False),
        (none_of("a", 1, "x", ""), False),
    ],
    ids=str,
)
def test_measure_is_met_known_values(measure: Measure, is_met: bool) -> None:
    assert measure.is_met is is_met


def test_check_without_measures_is_an_error() -> None:
    nothing = CheckResult("GPU-01", "t")
    assert nothing.status == "error"
    assert nothing.problems() == ["GPU-01: nothing was measured"]


def test_missed_limit_fails_check_and_suite() -> None:
    bad = at_most("other error", 2.0, 1.0, "x", "because")
    result = CheckResult("GPU-01", "t", (GOOD, bad))
    assert (result.status, result.missed) == ("failed", (bad,))
    report = SuiteReport(MACHINE, True, (CheckResult("GPU-02", "t", (GOOD,)), result))
    assert report.verdict == "failed"
    assert report.problems == ["GPU-01: other error: 2 x (at most 1)"]


def test_measure_text_includes_detail() -> None:
    measure = none_of("others", ["a"], "tensors", "", detail="a")
    assert (measure.name, str(measure)) == ("others", "others: 1 tensors (at most 0): a")
    assert measure.as_dict()["detail"] == "a"


def test_check_error_outweighs_measures() -> None:
    assert CheckResult("GPU-01", "t", (GOOD,), error="it broke").status == "error"


def test_skipped_check_is_not_a_failure() -> None:
    report = SuiteReport(MACHINE, True, (CheckResult("GPU-05", "t", skipped="one GPU"), CheckResult("1", "t", (GOOD,))))
    assert report.verdict == "ok"
    assert report.as_dict()["counts"] == {"ok": 1, "failed": 0, "error": 0, "skipped": 1}


def test_non_finite_values_serialize_to_json() -> None:
    result = CheckResult("GPU-01", "t", (at_most("a", math.nan, 1.0, "x", ""),))
    assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["measures"][0]["value"] == "nan"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_largest_returns_nan_at_any_position(place: int) -> None:
    """``max([3.0, nan, 1.0])`` is 3."""
    values = [3.0, 2.0, 1.0]
    assert (largest(values), largest_distance(values, [3.0, 2.5, 1.0])) == (3.0, 0.5)
    values[place] = math.nan
    for found in (
        largest(values),
        largest_distance(values, [3.0, 2.0, 1.0]),
        largest_distance([3.0, 2.0, 1.0], values),
    ):
        assert math.isnan(found)
        assert not at_most("a", found, 1e9, "x", "").is_met


def test_largest_of_nothing_misses_limit() -> None:
    assert not at_most("a", largest([]), 1e9, "x", "").is_met
    with pytest.raises(ValueError, match="shorter"):
        largest_distance([1.0, 2.0], [1.0])

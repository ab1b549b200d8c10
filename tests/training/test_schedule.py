"""Learning rate schedules: known values, joints and ends."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psannlm.config.train import TrainConfig
from psannlm.errors import TrainingError
from psannlm.training.schedule import learning_rate

SETTINGS = {"peak": 1.0, "min_lr": 0.1, "warmup_steps": 4, "total_steps": 11}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 0.25),
        (2, 0.5),
        (4, 1.0),
        (6, 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))),
        (8, 0.55),
        (12, 0.1),
        (13, 0.1),
        (1000, 0.1),
    ],
)
def test_cosine_schedule_known_values(step: int, expected: float) -> None:
    assert learning_rate(step, **SETTINGS) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("step", "expected"), [(1, 0.25), (4, 1.0), (5, 1.0), (12, 1.0), (50, 1.0)])
def test_constant_schedule_known_values(step: int, expected: float) -> None:
    assert learning_rate(step, **SETTINGS, schedule="constant") == expected


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 0.25),
        (4, 1.0),
        (5, 1.0),
        (8, 1.0),  # the last before a cooldown of three
        (9, 0.1 + 0.9 * (1 - math.sqrt(1 / 4))),
        (10, 0.1 + 0.9 * (1 - math.sqrt(2 / 4))),
        (11, 0.1 + 0.9 * (1 - math.sqrt(3 / 4))),
    ],
)
def test_wsd_schedule_known_values(step: int, expected: float) -> None:
    assert learning_rate(step, **SETTINGS, schedule="wsd", cooldown_steps=3) == pytest.approx(expected, abs=1e-15)


def test_wsd_schedule_step_past_cooldown_raises() -> None:
    with pytest.raises(TrainingError, match=r"step 12 is past the end of the schedule, 11; raise train\.max_steps"):
        learning_rate(12, **SETTINGS, schedule="wsd", cooldown_steps=3)


def test_wsd_schedule_before_cooldown_is_independent_of_length() -> None:
    """What a constant rate is for: the same checkpoint may be cooled down now, or later."""
    for step in range(1, 9):
        short = learning_rate(step, **SETTINGS, schedule="wsd", cooldown_steps=3)
        long = learning_rate(step, **{**SETTINGS, "total_steps": 100}, schedule="wsd", cooldown_steps=20)
        assert short == long


@pytest.mark.parametrize(("total", "share", "expected"), [(10, 0.2, 2), (11, 0.2, 2), (3, 0.01, 1), (7, 1.0, 7)])
def test_wsd_cooldown_is_fraction_and_at_least_one_step(total: int, share: float, expected: int) -> None:
    assert TrainConfig(schedule="wsd", cooldown_share=share).cooldown_steps(total) == expected
    assert TrainConfig(schedule="cosine", cooldown_share=share).cooldown_steps(total) == 0


def test_schedule_last_step_has_positive_lr() -> None:
    for n_steps in (1, 2, 100):
        settings = {"peak": 1.0, "min_lr": 0.0, "warmup_steps": 0, "total_steps": n_steps}
        assert learning_rate(n_steps, **settings) > 0.0
        assert learning_rate(n_steps, **settings, schedule="wsd", cooldown_steps=n_steps) > 0.0


def test_schedule_without_warmup_starts_near_peak() -> None:
    first = learning_rate(1, peak=2.0, min_lr=0.0, warmup_steps=0, total_steps=1000)
    assert 1.9999 < first < 2.0


def test_schedule_warmup_may_span_whole_run() -> None:
    assert learning_rate(10, peak=3.0, min_lr=0.5, warmup_steps=10, total_steps=10) == 3.0
    assert learning_rate(5, peak=3.0, min_lr=0.5, warmup_steps=10, total_steps=5) == 1.5


@given(
    warmup=st.integers(0, 50),
    decay=st.integers(1, 200),
    min_lr=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "constant"]),
)
def test_schedule_is_continuous_and_below_peak(warmup: int, decay: int, min_lr: float, schedule: str) -> None:
    settings = {"peak": 1.0, "min_lr": min_lr, "warmup_steps": warmup, "total_steps": warmup + decay}
    rates = [learning_rate(step, **settings, schedule=schedule) for step in range(1, warmup + decay + 3)]
    steepest = max(1 / warmup if warmup else 0.0, math.pi / 2 / decay)
    assert all(abs(b - a) <= steepest + 1e-12 for a, b in pairwise(rates))
    assert max(rates) <= 1.0
    after = rates[max(0, warmup - 1) :]
    assert all(b <= a for a, b in pairwise(after))
    assert rates[-1] == (min_lr if schedule == "cosine" else 1.0)

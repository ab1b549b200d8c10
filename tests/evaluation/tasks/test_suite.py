"""Paired comparison of scores: a verdict only where the interval excludes zero."""

from __future__ import annotations

import random

import pytest

from psannlm.evaluation.tasks.score import TaskScore, mean_stderr
from psannlm.evaluation.tasks.suite import compare_scores


def score_of(outcomes: list[float], *, higher_is_better: bool = True, task: str = "a") -> TaskScore:
    mean = sum(outcomes) / len(outcomes)
    return TaskScore(
        task, "acc", mean, mean_stderr(outcomes), 0.5, len(outcomes), "1", tuple(outcomes), higher_is_better
    )


def test_comparison_decides_by_pairs_not_by_means() -> None:
    draw = random.Random(0)
    baseline = [draw.random() for _ in range(100)]
    # Better by little on every question: far within the spread of the questions.
    better = [value + 0.01 + 0.001 * draw.random() for value in baseline]
    model, other = score_of(better), score_of(baseline)
    assert model.stderr is not None
    assert model.value - other.value < model.stderr
    (found,) = compare_scores([model], [other])
    assert found.verdict == "better"
    assert compare_scores([other], [model])[0].verdict == "worse"
    # The same values in another order are no evidence.
    draw.shuffle(better)
    assert compare_scores([score_of(better)], [other])[0].verdict == "undecided"


def test_comparison_respects_the_direction_of_a_metric() -> None:
    low, high = [1.0, 1.1, 1.2, 1.1], [2.0, 2.1, 2.3, 2.0]
    assert compare_scores([score_of(low)], [score_of(high)])[0].verdict == "worse"
    lower = [score_of(values, higher_is_better=False) for values in (low, high)]
    assert compare_scores(lower[:1], lower[1:])[0].verdict == "better"


@pytest.mark.parametrize("outcomes", [[1.0], [1.0, 0.0, 1.0]])
def test_comparison_of_few_or_equal_outcomes_is_undecided(outcomes: list[float]) -> None:
    (found,) = compare_scores([score_of(outcomes)], [score_of(outcomes)])
    assert found.verdict == "undecided"


def test_comparison_needs_the_same_questions() -> None:
    assert compare_scores([score_of([1.0, 0.0])], [score_of([1.0, 0.0, 1.0])]) == []
    assert compare_scores([score_of([1.0, 0.0])], [score_of([1.0, 0.0], task="b")]) == []

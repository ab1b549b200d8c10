"""Task scores of a study: those of the measured validation, paired by seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from psannlm.experiments.lr_selection import Choice
from psannlm.experiments.results import _tasks
from psannlm.reports.runs import RunRecord


def record_of(score: float) -> RunRecord:
    """The best validation is the first, with half of the last one's score."""
    evals: list[dict[str, Any]] = [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 1.5}]
    tasks = [
        {"kind": "tasks", "step": step, "a": value, "a/stderr": 0.1, "a/chance": 0.5}
        for step, value in ((2, score / 2), (4, score))
    ]
    return RunRecord(Path("x"), "x", {}, {}, [], evals, None, None, None, (), task_rows=tuple(tasks))


def choice_of(scores: dict[int, float], measure: str) -> Choice:
    records = {seed: record_of(score) for seed, score in scores.items()}
    return Choice(1e-3, "only", False, [], records, measure)


@pytest.mark.parametrize(("measure", "factor"), [("final", 1.0), ("best", 0.5)])
def test_study_task_scores_are_those_of_measured_validation(measure: str, factor: float) -> None:
    base = choice_of({1: 0.6, 2: 0.7, 3: 0.8}, measure)
    other = choice_of({1: 0.7, 2: 0.8, 3: 0.91}, measure)
    found = _tasks(other, base)["a"]
    assert found.chance == 0.5
    assert found.score.mean == pytest.approx(factor * (0.7 + 0.8 + 0.91) / 3)
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(factor * 0.31 / 3)
    assert found.difference.low is not None
    assert found.difference.low > 0
    assert _tasks(base, base)["a"].difference is None

"""Score of a model on a task: value, standard error, chance level and number of questions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task, metric: their names.
        value: the score, a fraction for accuracies.
        stderr: standard error of ``value``; None where it is not known.
        chance: expected value of guessing; None where the task has no choices.
        n: number of questions; None for the average of a group of tasks.
        version: of the task; scores of different versions are not comparable.
        outcomes: the score of each independent part of the task, for paired comparisons: of a question, or of questions
            that share their choices.
        higher_is_better: whether a higher value is a better one.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    chance: float | None
    n: int | None
    version: str
    outcomes: tuple[float, ...] = field(default=(), repr=False)
    higher_is_better: bool = True

    def as_dict(self) -> dict[str, float | int | str | None]:
        """Return the figures by name, without the outcomes."""
        return {
            "task": self.task,
            "metric": self.metric,
            "value": self.value,
            "stderr": self.stderr,
            "chance": self.chance,
            "n": self.n,
            "version": self.version,
        }


def mean_stderr(outcomes: Sequence[float]) -> float | None:
    """Return the standard error of the mean of independent outcomes, or None for fewer than two."""
    if len(outcomes) < 2:
        return None
    return statistics.stdev(outcomes) / math.sqrt(len(outcomes))

"""Tasks by name, of psannlm's own packs and of lm-evaluation-harness, and paired comparison of two models."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from psannlm.errors import ConfigError, nearest
from psannlm.evaluation.statistics import interval_half_width
from psannlm.evaluation.tasks.harness import EngineModel, run_harness
from psannlm.evaluation.tasks.packs import LAST_WORD, PACK_GROUPS, PACKS, SEED, expand_packs, run_pack
from psannlm.evaluation.tasks.score import TaskScore
from psannlm.generation.scoring import Scorer
from psannlm.runtime.progress import OnProgress, ignore_progress
from psannlm.tokenizers.base import Tokenizer

_OWN = "psannlm_"
Verdict = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class TaskSettings:
    """What to ask: see :func:`~psannlm.evaluation.tasks.packs.run_pack` and ``run_harness`` for the settings."""

    num_fewshot: int | None = None
    limit: int | None = None
    seed: int = SEED
    tasks_dir: Path | None = None
    allow_download: bool = False


def require_tasks(names: Sequence[str], settings: TaskSettings, *, has_text: bool) -> list[str]:
    """Return the names of single packs and of lm-eval's tasks, each once.

    Raises:
        ConfigError: there is no name, a name that starts with ``psannlm_`` is unknown, a pack needs a text that is not
            there, or solved examples are asked for with a pack.
    """
    known = [*PACKS, *PACK_GROUPS]
    expanded = expand_packs(name for name in names if name)
    if not expanded:
        raise ConfigError("--tasks: no task is named")
    for name in expanded:
        if name.startswith(_OWN) and name not in PACKS:
            raise ConfigError(f"--tasks: there is no task {name!r:.80}{nearest(name, known)}; {', '.join(known)}")
    if LAST_WORD in expanded and not has_text:
        raise ConfigError(f"--tasks: {LAST_WORD} is cut from held-out text of your corpus; name its files as FILE")
    if settings.num_fewshot and (packs := [name for name in expanded if name in PACKS]):
        raise ConfigError(f"--num-fewshot: {packs[0]} is asked without solved examples; leave the option out")
    return expanded


def run_tasks(
    names: Sequence[str],
    scorer: Scorer,
    tokenizer: Tokenizer,
    settings: TaskSettings,
    *,
    texts: Iterable[str] = (),
    on_progress: OnProgress = ignore_progress,
) -> list[TaskScore]:
    """Return the scores of tasks: the packs first, then lm-eval's.

    Args:
        names: as :func:`require_tasks` returns them.
        texts: held-out documents for ``psannlm_last_word``.
        on_progress: called after each pass.

    Raises:
        ConfigError, CorpusError, GenerationError: a task cannot be run.
    """
    scores = [
        run_pack(
            name,
            scorer,
            tokenizer,
            limit=settings.limit,
            seed=settings.seed,
            texts=texts if name == LAST_WORD else (),
            on_progress=on_progress,
        )
        for name in names
        if name in PACKS
    ]
    others = [name for name in names if name not in PACKS]
    if others:
        scores += run_harness(
            others,
            EngineModel(scorer, tokenizer, on_progress),
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            tasks_dir=settings.tasks_dir,
            allow_download=settings.allow_download,
        )
    return scores


@dataclass(frozen=True)
class Comparison:
    """A model's score minus the baseline's on the same questions, and whether it is better.

    Attributes:
        difference: mean of the paired differences.
        low, high: their 95 % interval; None for a single pair.
        n: number of pairs: questions, or groups of questions.
        verdict: ``undecided`` unless the interval excludes zero.
    """

    task: str
    metric: str
    difference: float
    low: float | None
    high: float | None
    n: int
    verdict: Verdict


def compare_scores(scores: Sequence[TaskScore], baseline: Sequence[TaskScore]) -> list[Comparison]:
    """Return the comparison of each metric whose single outcomes both have, paired by question or group."""
    by_name = {(score.task, score.metric): score for score in baseline}
    found = []
    for score in scores:
        other = by_name.get((score.task, score.metric))
        if other is None or not score.outcomes or len(other.outcomes) != len(score.outcomes):
            continue
        differences = [mine - theirs for mine, theirs in zip(score.outcomes, other.outcomes, strict=True)]
        mean, n = statistics.fmean(differences), len(differences)
        low = high = None
        if n > 1:
            half = interval_half_width(statistics.stdev(differences), n)
            low, high = mean - half, mean + half
        verdict: Verdict = "undecided"
        if low is not None and high is not None and not low <= 0.0 <= high:
            verdict = "better" if (low > 0.0) == score.higher_is_better else "worse"
        found.append(Comparison(score.task, score.metric, mean, low, high, n, verdict))
    return found

"""Task packs that need no download: questions generated from a seed, or cut from the user's own text.

Questions come in groups that share their choices, and each choice is the right answer of exactly one question of its
group. A model that prefers some choices whatever the context, such as shorter words, or one of constant logits
therefore scores exactly the chance level.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice

from psannlm.data.synthetic.algorithmic import MODULUS, QuestionGroup, copy_questions, parity_questions, sum_questions
from psannlm.errors import ConfigError
from psannlm.evaluation.tasks.last_word import N_CHOICES, last_word_questions
from psannlm.evaluation.tasks.minimal_pairs import agreement_questions, negation_questions, number_questions
from psannlm.evaluation.tasks.score import TaskScore, mean_stderr
from psannlm.generation.scoring import Continuation, Scorer
from psannlm.runtime.progress import OnProgress, ignore_progress
from psannlm.tokenizers.base import Tokenizer

LAST_WORD = "psannlm_last_word"
SEED = 1337
_VERSION = "1"
_ACCURACY = "accuracy"


@dataclass(frozen=True)
class Pack:
    """Groups of questions drawn with a random generator, the choices of each question, and the usual number of groups.

    ``questions`` is None for the pack that is cut from a text.
    """

    questions: Callable[[random.Random], Iterator[QuestionGroup]] | None
    n_choices: int
    n_groups: int


PACKS = {
    "psannlm_modular_addition": Pack(sum_questions, MODULUS, 8),
    "psannlm_parity": Pack(parity_questions, 2, 200),
    "psannlm_copying": Pack(copy_questions, 26, 20),
    "psannlm_agreement": Pack(agreement_questions, 2, 200),
    "psannlm_negation": Pack(negation_questions, 2, 200),
    "psannlm_number": Pack(number_questions, 2, 200),
    LAST_WORD: Pack(None, N_CHOICES, 100),
}
# Names that stand for several packs.
PACK_GROUPS = {
    "psannlm_algorithmic": ("psannlm_modular_addition", "psannlm_parity", "psannlm_copying"),
    "psannlm_pairs": ("psannlm_agreement", "psannlm_negation", "psannlm_number"),
}


def expand_packs(names: Iterable[str]) -> list[str]:
    """Return ``names`` with the names of several packs replaced by theirs, each name once."""
    return list(dict.fromkeys(pack for name in names for pack in PACK_GROUPS.get(name, (name,))))


@dataclass(frozen=True)
class PreparedPack:
    """The questions of a pack, and their choices as continuations, in the order of the questions."""

    name: str
    groups: Sequence[QuestionGroup]
    rows: Sequence[Continuation]


def prepare_pack(
    name: str, tokenizer: Tokenizer, *, limit: int | None = None, seed: int = SEED, texts: Iterable[str] = ()
) -> PreparedPack:
    """Return the questions of a pack for a tokenizer.

    Args:
        limit: most questions, rounded up to whole groups.
        seed: of the questions.
        texts: held-out documents, for ``psannlm_last_word``.

    Raises:
        ConfigError: there is no such pack.
        CorpusError: ``texts`` have too few sentences.
    """
    pack = PACKS.get(name)
    if pack is None:
        raise ConfigError(f"there is no task pack {name!r}; there are {', '.join([*PACKS, *PACK_GROUPS])}")
    n_groups = pack.n_groups if limit is None else min(pack.n_groups, -(-limit // pack.n_choices))
    draw = random.Random(f"{name} {seed}")
    drawn = last_word_questions(texts, draw, n_groups) if pack.questions is None else pack.questions(draw)
    groups = list(islice(drawn, n_groups))
    rows = [row for group in groups for context in group.contexts for row in _rows(tokenizer, context, group.choices)]
    return PreparedPack(name, groups, rows)


def score_pack(pack: PreparedPack, scorer: Scorer, on_progress: OnProgress = ignore_progress) -> TaskScore:
    """Return a model's accuracy on a pack: the fraction of questions whose right choice is the most likely one.

    Choices that are equally likely share a point. The standard error is that of independent groups, because the
    questions of a group are not independent.

    Args:
        on_progress: called after each pass.
    """
    found = scorer.score(pack.rows, on_progress, pack.name)
    logprobs = iter(likelihood.logprob for likelihood in found)
    # Exact sums: a third of a point, three times, is one.
    outcomes: list[Fraction] = []
    for group in pack.groups:
        points = [_point(list(islice(logprobs, len(group.choices))), right) for right in range(len(group.contexts))]
        outcomes.append(sum(points, Fraction()) / len(points))
    return TaskScore(
        task=pack.name,
        metric=_ACCURACY,
        value=float(sum(outcomes, Fraction()) / len(outcomes)),
        stderr=mean_stderr(list(map(float, outcomes))),
        chance=1 / PACKS[pack.name].n_choices,
        n=sum(len(group.contexts) for group in pack.groups),
        version=_VERSION,
        outcomes=tuple(map(float, outcomes)),
    )


def run_pack(
    name: str,
    scorer: Scorer,
    tokenizer: Tokenizer,
    *,
    limit: int | None = None,
    seed: int = SEED,
    texts: Iterable[str] = (),
    on_progress: OnProgress = ignore_progress,
) -> TaskScore:
    """Return :func:`score_pack` of :func:`prepare_pack`."""
    pack = prepare_pack(name, tokenizer, limit=limit, seed=seed, texts=texts)
    return score_pack(pack, scorer, on_progress)


def _rows(tokenizer: Tokenizer, context: str, choices: Sequence[str]) -> list[Continuation]:
    """Return the choices as continuations of the tokens that all of them have in common.

    The context and a choice are encoded together: a tokenizer may join their characters at the border.
    """
    wholes = [[tokenizer.bos_id, *tokenizer.encode(context + choice)] for choice in choices]
    first, last = min(wholes), max(wholes)
    shared = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    shared = min(shared, *(len(whole) - 1 for whole in wholes))
    return [Continuation(whole[:shared], whole[shared:]) for whole in wholes]


def _point(logprobs: Sequence[float], right: int) -> Fraction:
    """Return 1 if the right choice is the most likely one, or its part of a point among equally likely ones."""
    best = max(logprobs)
    return Fraction(logprobs[right] == best, sum(logprob == best for logprob in logprobs))

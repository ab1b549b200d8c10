"""Task packs: exact chance without knowledge, full marks with it, the same questions from the same seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

import pytest

from psannlm.data.synthetic.algorithmic import TASKS, QuestionGroup
from psannlm.errors import ConfigError, CorpusError
from psannlm.evaluation.tasks.last_word import last_word_questions
from psannlm.evaluation.tasks.packs import LAST_WORD, PACK_GROUPS, PACKS, expand_packs, run_pack
from psannlm.generation.scoring import Continuation, Likelihood, Scorer
from psannlm.tokenizers.base import Tokenizer

WORDS = "harbor winter morning garden silence river letter window".split()
NAMES = "Anna Peter Alice George Jane Tom Mary John".split()
TEXTS = [
    f"{name} had never before seen the old {word}. It was late. Nobody but {name} ever spoke of the {word}."
    for name, word in zip(NAMES, WORDS, strict=True)
]


class Oracle:
    """A scorer that knows the right choice of every question, and answers wrongly where told to."""

    def __init__(self, groups: Sequence[QuestionGroup], tokenizer: Tokenizer, wrong: int = 0) -> None:
        pairs = [pair for group in groups for pair in zip(group.contexts, group.choices, strict=True)]
        self.right = {tuple(tokenizer.encode(context + choice)) for context, choice in pairs[wrong:]}
        self.asked = 0

    def score(self, rows: Sequence[Continuation], on_progress: Any = None, what: str = "") -> list[Likelihood]:
        self.asked += len(rows)
        return [Likelihood(0.0 if (*row.context[1:], *row.ids) in self.right else -1.0, False) for row in rows]


def groups_of(name: str, n: int, seed: int = 1337) -> list[QuestionGroup]:
    draw, questions = random.Random(f"{name} {seed}"), PACKS[name].questions
    made = last_word_questions(TEXTS, draw, n) if questions is None else questions(draw)
    return list(islice(made, n))


@pytest.mark.parametrize("name", PACKS)
def test_pack_constant_logits_score_exactly_chance(
    name: str, constant_scorer: Scorer, byte_tokenizer: Tokenizer
) -> None:
    score = run_pack(name, constant_scorer, byte_tokenizer, limit=20, texts=TEXTS)
    assert score.value == score.chance == 1 / PACKS[name].n_choices


@pytest.mark.parametrize("name", PACKS)
def test_pack_counts_right_answers(name: str, byte_tokenizer: Tokenizer) -> None:
    groups = groups_of(name, 2)
    k = PACKS[name].n_choices
    right = Oracle(groups, byte_tokenizer)
    score = run_pack(name, right, byte_tokenizer, limit=k + 1, texts=TEXTS)  # type: ignore[arg-type]
    assert (score.value, score.n, score.stderr, score.outcomes) == (1.0, 2 * k, 0.0, (1.0, 1.0))
    assert right.asked == 2 * k * k
    # Where no choice is preferred, each has its part of the point.
    missed = run_pack(name, Oracle(groups, byte_tokenizer, wrong=1), byte_tokenizer, limit=k + 1, texts=TEXTS)  # type: ignore[arg-type]
    assert missed.outcomes == (pytest.approx(1 - (1 - 1 / k) / k), 1.0)
    assert missed.value == pytest.approx(1 - (1 - 1 / k) / k / 2)
    assert missed.stderr == pytest.approx((1 - 1 / k) / k / 2)


@pytest.mark.parametrize("name", PACKS)
def test_pack_every_choice_is_right_once(name: str) -> None:
    groups = groups_of(name, 8)
    assert len(groups) == (4 if name == LAST_WORD else 8)
    for group in groups:
        assert len(group.contexts) == len(group.choices) == PACKS[name].n_choices
        assert max(Counter(group.contexts).values()) == max(Counter(group.choices).values()) == 1
        # A choice that another one begins with would always be the more likely one.
        assert not any(a != b and a.startswith(b) for a in group.choices for b in group.choices)
    assert groups == groups_of(name, 8)
    if name != LAST_WORD:
        assert groups != groups_of(name, 8, seed=1)
        assert len({group.contexts for group in groups}) == 8


def test_pack_algorithmic_answers_obey_their_rule() -> None:
    for task in TASKS:
        for group in groups_of(f"psannlm_{task}", 8):
            for context, choice in zip(group.contexts, group.choices, strict=True):
                if task == "parity":
                    bits = context[:-1].rpartition("e" if context.rfind("e") > context.rfind("o") else "o")[2]
                    assert choice == "eo"[bits.count("1") % 2]
                elif task == "copying":
                    letters, _, copied = context.partition("|")
                    assert letters[: len(copied) + 1] == copied + choice
                else:
                    whole = context + choice
                    numbers = [whole[0], whole[2], whole[4]]
                    a, b, c = ("".join(chr(i) for i in range(33, 127) if chr(i) not in "+=").index(n) for n in numbers)
                    assert (a + b) % 89 == c


def test_pack_last_word_takes_sentences_of_the_text() -> None:
    groups = list(last_word_questions(TEXTS, random.Random(0), 100))
    sentences = {
        context + choice for group in groups for context, choice in zip(group.contexts, group.choices, strict=True)
    }
    assert len(sentences) == 16
    assert all(any(sentence in text for text in TEXTS) for sentence in sentences)
    with pytest.raises(CorpusError, match="the text has 2 sentences of 6 words or more"):
        list(last_word_questions(TEXTS[:1], random.Random(0), 5))


def test_pack_names_expand_once_and_unknown_raise(scorer: Scorer, byte_tokenizer: Tokenizer) -> None:
    names = expand_packs(["psannlm_number", "psannlm_pairs", "hellaswag"])
    assert names == ["psannlm_number", "psannlm_agreement", "psannlm_negation", "hellaswag"]
    assert {pack for packs in PACK_GROUPS.values() for pack in packs} == {*PACKS} - {LAST_WORD}
    with pytest.raises(ConfigError, match="there is no task pack 'psannlm_numbers'"):
        run_pack("psannlm_numbers", scorer, byte_tokenizer)


def test_pack_scores_do_not_depend_on_batch_size(scorer: Scorer, byte_tokenizer: Tokenizer) -> None:
    for name in ("psannlm_agreement", LAST_WORD):
        scores = {
            run_pack(name, Scorer(scorer.engine, size), byte_tokenizer, limit=20, texts=TEXTS) for size in (1, 7, 64)
        }
        assert len(scores) == 1

"""Minimal pairs of English sentences from templates: agreement, negation and number.

Two contexts that differ in one word, and two endings, each of which is grammatical after one of them. The convention of
BLiMP (Warstadt et al. 2020, arXiv 1912.00582), with both contexts of a pair asked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from psannlm.data.synthetic.algorithmic import QuestionGroup

_NOUNS = (
    *((noun, f"{noun}s") for noun in "boy girl dog cat bird king queen teacher farmer doctor brother sister".split()),
    *((noun, f"{noun}s") for noun in "friend neighbor sailor tree house table book letter ship road river".split()),
    *(("man", "men"), ("woman", "women"), ("child", "children"), ("mouse", "mice")),
)
_LINKS = ("near", "behind", "beside", "with")
_VERBS = (("is", "are"), ("was", "were"), ("has been", "have been"))
_STATES = ("here", "there", "old", "small", "late", "gone", "alone", "outside")
_NAMES = ("John", "Mary", "Tom", "Anna", "Peter", "Alice", "George", "Jane", "The man", "The woman", "The boy")
_PAST = (("see", "saw"), ("hear", "heard"), ("find", "found"), ("know", "knew"), ("take", "took"), ("want", "wanted"))
_ACTIONS = (
    ("sing", "sings"),
    ("sleep", "sleeps"),
    ("work", "works"),
    ("eat", "eats"),
    ("run", "runs"),
    ("read", "reads"),
)
_SINGULAR, _PLURAL = ("this", "that", "one", "every", "each"), ("these", "those", "two", "three", "many", "several")


def agreement_questions(draw: random.Random) -> Iterator[QuestionGroup]:
    """Yield pairs of subject and verb with a noun of either number between them: ``The dogs near the tree are``."""

    def make() -> QuestionGroup:
        (singular, plural), others = draw.sample(_NOUNS, 2)
        rest = f" {draw.choice(_LINKS)} the {draw.choice(others)}"
        state = draw.choice(_STATES)
        one, many = draw.choice(_VERBS)
        return QuestionGroup(
            (f"The {singular}{rest}", f"The {plural}{rest}"), (f" {one} {state}.", f" {many} {state}.")
        )

    return _different(make)


def negation_questions(draw: random.Random) -> Iterator[QuestionGroup]:
    """Yield pairs of a negated and a plain sentence, and words that go with one: ``did not see`` with ``anything``."""

    def object_pair() -> QuestionGroup:
        name, (base, past) = draw.choice(_NAMES), draw.choice(_PAST)
        endings = draw.choice(((" anything.", " something."), (" anyone.", " someone.")))
        return QuestionGroup((f"{name} did not {base}", f"{name} {past}"), endings)

    def addition() -> QuestionGroup:
        (name, other), (base, third) = draw.sample(_NAMES, 2), draw.choice(_ACTIONS)
        other = other.replace("The", "the")
        contexts = f"{name} does not {base}, and {other} does not {base}", f"{name} {third}, and {other} {third}"
        return QuestionGroup(contexts, (" either.", " too."))

    def amount() -> QuestionGroup:
        where = draw.choice(("in the house", "on the table", "in the garden", "on the ship", "at home"))
        what = draw.choice(("water", "bread", "money", "milk", "paper", "wood", "gold", "salt"))
        verb = draw.choice(("is", "was"))
        contexts = f"There {verb} not", f"There {verb}"
        return QuestionGroup(contexts, (f" any {what} {where}.", f" some {what} {where}."))

    kinds = (object_pair, addition, amount)
    return _different(lambda: draw.choice(kinds)())


def number_questions(draw: random.Random) -> Iterator[QuestionGroup]:
    """Yield pairs of a determiner or number word and its noun: ``these`` with ``dogs``."""

    def make() -> QuestionGroup:
        singular, plural = draw.choice(_NOUNS)
        start = f"{draw.choice(_NAMES)} {draw.choice(_PAST)[1]}"
        contexts = f"{start} {draw.choice(_SINGULAR)}", f"{start} {draw.choice(_PLURAL)}"
        return QuestionGroup(contexts, (f" {singular}.", f" {plural}."))

    return _different(make)


def _different(make: Callable[[], QuestionGroup]) -> Iterator[QuestionGroup]:
    """Yield groups that have not been yielded before; the templates have more of them than a pack takes."""
    seen = set()
    while True:
        group = make()
        if group not in seen:
            seen.add(group)
            yield group

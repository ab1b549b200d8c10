"""Synthetic corpus of short stories in simple, regular English, one per line, from a seed and a size.

They have dependencies at every distance: letters and words, agreement of number within a sentence, pronouns that refer
to the last person named, people who keep home, trade and possession for a whole story, and a last chapter that repeats
the first. Names are random, so that facts about a story can only be read from the story itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

# What kinds of people and things there are; their combinations, not their number, make the books differ.
_FIRST = ("Ma", "Ro", "Te", "Li", "Su", "Da", "Ki", "No", "Be", "Ha", "Jo", "Vi", "Ga", "Pe", "O", "I")
_LAST = ("ra", "lin", "mo", "tta", "nek", "dis", "ron", "vel", "sha", "bo", "mir", "zu", "gan", "fie")
_PLACES = ("harbour", "mill", "forest", "market", "lighthouse", "valley", "bridge", "old town", "island", "quarry")
_TRADES = ("baker", "sailor", "weaver", "miller", "smith", "gardener", "teacher", "hunter", "painter", "ferryman")
_THINGS = (
    ("lamp", "lamps"),
    ("key", "keys"),
    ("map", "maps"),
    ("drum", "drums"),
    ("knife", "knives"),
    ("letter", "letters"),
    ("coin", "coins"),
    ("horse", "horses"),
    ("book", "books"),
    ("bell", "bells"),
)
_COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey")
_TIMES = ("In the morning", "At noon", "In the evening", "That night", "A week later", "When the rain stopped")
_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
# Verbs of one who acts, and of several: what agreement is about.
_VERBS = (("walks", "walk"), ("goes", "go"), ("hurries", "hurry"), ("returns", "return"), ("sails", "sail"))
_FEELINGS = (("is", "are", "glad"), ("is", "are", "tired"), ("was", "were", "late"), ("seems", "seem", "sure"))
_CHAPTERS, _SCENES = 4, 12


@dataclass(frozen=True)
class _Person:
    """A person with attributes that are the same in the whole story."""

    name: str
    pronoun: str
    possessive: str
    trade: str
    home: str
    colour: str
    thing: tuple[str, str]
    count: int


def write_books(seed: int, n_bytes: int) -> Iterator[str]:
    """Yield stories (ASCII, a line of some 4,000 bytes each), a function of ``seed``, up to ``n_bytes`` in total.

    The last one is cut at a sentence, so that all together have at most ``n_bytes``, and less by a sentence at most.
    """
    left = n_bytes
    number = 0
    while left > 0:
        book = _book(random.Random(f"{seed}/{number}"), number + 1)
        if len(book) > left:
            end = book.rfind(". ", 0, left)
            book = f"{book[: end + 1]}\n" if end >= 0 else ""
            left = len(book)
        if book:
            yield book
        left -= len(book)
        number += 1


def _book(rng: random.Random, number: int) -> str:
    people = _people(rng)
    sentences = [f"Book {number}: {people[0].name} and the {people[0].thing[0]}."]
    for chapter in range(1, _CHAPTERS + 1):
        sentences.append(f"Chapter {chapter}.")
        sentences += [_introduction(person) for person in people] if chapter == 1 else []
        sentences += [_scene(rng, people) for _ in range(_SCENES)]
        sentences += [_recall(person) for person in people] if chapter == _CHAPTERS else []
    return " ".join(sentences) + "\n"


def _people(rng: random.Random) -> list[_Person]:
    names = rng.sample([first + last for first in _FIRST for last in _LAST], 3)
    homes, trades, things = rng.sample(_PLACES, 3), rng.sample(_TRADES, 3), rng.sample(_THINGS, 3)
    people = []
    for name, home, trade, thing in zip(names, homes, trades, things, strict=True):
        pronoun, possessive = rng.choice((("she", "her"), ("he", "his")))
        colour, count = rng.choice(_COLOURS), rng.randint(2, 9)
        people.append(_Person(name, pronoun, possessive, trade, home, colour, thing, count))
    return people


def _introduction(person: _Person) -> str:
    return (
        f"{person.name} is a {person.trade} and lives by the {person.home}. {person.pronoun.capitalize()} has "
        f"{_NUMBERS[person.count - 2]} {person.colour} {person.thing[1]}."
    )


def _recall(person: _Person) -> str:
    """Repeat the facts of the first chapter in other words: predicting them needs a context of the whole story."""
    return (
        f"So the {person.trade} went home to the {person.home}, and {person.name} counted {person.possessive} "
        f"{person.colour} {person.thing[1]}: {_NUMBERS[person.count - 2]}, as on the first day."
    )


def _scene(rng: random.Random, people: list[_Person]) -> str:
    first, second = rng.sample(people, 2)
    time, place = rng.choice(_TIMES), rng.choice((first.home, second.home, rng.choice(_PLACES)))
    one, many = rng.choice(_VERBS)
    singular, plural, feeling = rng.choice(_FEELINGS)
    kind = rng.randrange(5)
    if kind == 0:
        return (
            f"{time}, {first.name} {one} to the {place} with {first.possessive} {first.colour} {first.thing[0]}. "
            f"{first.pronoun.capitalize()} {singular} {feeling}."
        )
    if kind == 1:
        return f"{time}, {first.name} and {second.name} {many} to the {place}. They {plural} {feeling}."
    if kind == 2:
        return (
            f'"Where is the {second.trade}?" asks {first.name}. "{second.name} {one} to the {second.home}," says '
            f"{first.possessive} friend."
        )
    if kind == 3:
        given = rng.randint(2, 9)
        left = first.count * 10 - given
        return (
            f"{first.name} the {first.trade} sells {_NUMBERS[given - 2]} {first.thing[1]} at the {place}: of "
            f"{first.count * 10} there are {left} left."
        )
    mine, yours = f"{first.thing[1]} of {first.name}", f"{second.thing[0]} of {second.name}"
    return f"The {mine} are {first.colour}, and the {yours} is {second.colour}."

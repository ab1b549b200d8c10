"""Synthetic corpora of three algorithmic tasks: modular addition, parity and copying.

Modular addition is that of Power et al. 2022 (arXiv 2201.02177). One character is one token of the character tokenizer.
Everything except the answers is random, and cannot be predicted.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

TaskName = Literal["modular_addition", "parity", "copying"]

MODULUS = 89
_NUMERALS = "".join(chr(code) for code in range(33, 127) if chr(code) not in "+=")
_ANSWER_MARK = "="
_PARITY_GROUPS = 12
_PARITY_LENGTHS = (1, 8)
_EVEN_ODD = "eo"
_COPY_LENGTHS = (16, 48)
_COPY_MARK = "|"


@dataclass(frozen=True)
class Task:
    """A rule: ``documents`` draws texts of one line without end, or all there are; ``answers`` reads one.

    ``answers`` returns the indices of the characters that follow from those before them.
    """

    documents: Callable[[random.Random], Iterator[str]]
    answers: Callable[[str], Sequence[int]]


def _sums(draw: random.Random) -> Iterator[str]:
    """Every two numbers of the ring once, ``a+b=c``: those held out, whichever way round, are nowhere else."""
    pairs = [(a, b) if draw.random() < 0.5 else (b, a) for a in range(MODULUS) for b in range(a, MODULUS)]
    draw.shuffle(pairs)
    for a, b in pairs:
        yield f"{_NUMERALS[a]}+{_NUMERALS[b]}{_ANSWER_MARK}{_NUMERALS[(a + b) % MODULUS]}"


def _parities(draw: random.Random) -> Iterator[str]:
    """Groups of one to eight bits, a mark and their parity, ``e`` or ``o``; the short ones help to learn the long."""
    while True:
        groups = [draw.choices("01", k=draw.randint(*_PARITY_LENGTHS)) for _ in range(_PARITY_GROUPS)]
        yield "".join(f"{''.join(bits)}{_ANSWER_MARK}{_EVEN_ODD[bits.count('1') % 2]}" for bits in groups)


def _copies(draw: random.Random) -> Iterator[str]:
    """16 to 48 letters, a mark, and the letters again."""
    while True:
        letters = "".join(draw.choices(string.ascii_lowercase, k=draw.randint(*_COPY_LENGTHS)))
        yield f"{letters}{_COPY_MARK}{letters}"


@dataclass(frozen=True)
class QuestionGroup:
    """Questions that share their choices: ``choices[i]`` is the right continuation of ``contexts[i]``."""

    contexts: tuple[str, ...]
    choices: tuple[str, ...]


def sum_questions(draw: random.Random) -> Iterator[QuestionGroup]:
    """Yield, for each first number, its sums with every number of the ring."""
    for a in draw.sample(range(MODULUS), MODULUS):
        contexts = tuple(f"{_NUMERALS[a]}+{numeral}{_ANSWER_MARK}" for numeral in _NUMERALS[:MODULUS])
        yield QuestionGroup(contexts, tuple(_NUMERALS[(a + b) % MODULUS] for b in range(MODULUS)))


def parity_questions(draw: random.Random) -> Iterator[QuestionGroup]:
    """Yield pairs of groups of bits that differ in the last one, after the answered groups before them."""
    for document in _parities(draw):
        before, mark, _ = document.rpartition(_ANSWER_MARK)
        last = before[-1]
        contexts = {bit: f"{before[:-1]}{bit}{mark}" for bit in (last, "10"[int(last)])}
        # The document ends with the answer for its own last bit.
        answer = document[-1]
        yield QuestionGroup(tuple(contexts.values()), (answer, _EVEN_ODD[answer == _EVEN_ODD[0]]))


def copy_questions(draw: random.Random) -> Iterator[QuestionGroup]:
    """Yield 26 rows of letters that differ in one place, copied up to that place."""
    for document in _copies(draw):
        letters = document.partition(_COPY_MARK)[0]
        at = draw.randrange(len(letters))
        rows = (f"{letters[:at]}{letter}{letters[at + 1 :]}" for letter in string.ascii_lowercase)
        yield QuestionGroup(tuple(f"{row}{_COPY_MARK}{row[:at]}" for row in rows), tuple(string.ascii_lowercase))


TASKS: dict[TaskName, Task] = {
    "modular_addition": Task(_sums, lambda document: [document.index(_ANSWER_MARK) + 1]),
    "parity": Task(
        _parities, lambda document: [at + 1 for at, character in enumerate(document) if character == _ANSWER_MARK]
    ),
    "copying": Task(_copies, lambda document: range(document.index(_COPY_MARK) + 1, len(document))),
}


def write_task(name: TaskName, seed: int, n_bytes: int) -> Iterator[str]:
    """Yield lines of a task, each with its end of line, up to ``n_bytes`` of ASCII or all there are.

    Raises:
        KeyError: there is no such task.
    """
    left = n_bytes
    for document in TASKS[name].documents(random.Random(f"{name} {seed}")):
        left -= len(document) + 1
        if left < 0:
            return
        yield f"{document}\n"

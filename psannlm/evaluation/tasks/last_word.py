"""Choice of the last word of sentences of a text, among last words of other sentences of the same text."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator

from psannlm.data.synthetic.algorithmic import QuestionGroup
from psannlm.errors import CorpusError

N_CHOICES = 4
_MIN_WORDS = 6
_MIN_LETTERS = 3
# Sentences that are kept per question, so that groups of different last words can be found.
_SPARE = 8
_BORDER = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
_LONGEST_SENTENCE = 1000


def last_word_questions(texts: Iterable[str], draw: random.Random, n_groups: int) -> Iterator[QuestionGroup]:
    """Yield up to ``n_groups`` groups of four sentences without their last words, and these words as the choices.

    A sentence has six words or more, ends with a full stop, and its last word has three lower-case letters or more.
    The text is read once; what is kept of it does not grow with its length.

    Raises:
        CorpusError: there are not four such sentences with different last words.
    """
    kept: list[tuple[str, str]] = []
    most = n_groups * N_CHOICES * _SPARE
    n_seen = 0
    for sentence in _sentences(texts):
        # Reservoir sampling: each sentence is kept with equal probability.
        n_seen += 1
        at = n_seen - 1 if n_seen <= most else draw.randrange(n_seen)
        if at == len(kept):
            kept.append(sentence)
        elif at < most:
            kept[at] = sentence
    draw.shuffle(kept)
    n_yielded = 0
    waiting: list[tuple[str, str]] = kept
    while n_yielded < n_groups:
        chosen: dict[str, str] = {}
        rest = []
        for context, word in waiting:
            if len(chosen) < N_CHOICES and word not in chosen and context not in chosen.values():
                chosen[word] = context
            else:
                rest.append((context, word))
        if len(chosen) < N_CHOICES:
            break
        yield QuestionGroup(tuple(chosen.values()), tuple(f" {word}." for word in chosen))
        waiting = rest
        n_yielded += 1
    if n_yielded == 0:
        raise CorpusError(
            f"the text has {n_seen:,} sentences of {_MIN_WORDS} words or more that end with a word and a full stop; a "
            f"choice needs {N_CHOICES} with different last words: add text"
        )


def _sentences(texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (sentence without its last word, last word)."""
    for text in texts:
        for part in _BORDER.split(text):
            words = part[: _LONGEST_SENTENCE + 1].split()
            if len(part) > _LONGEST_SENTENCE or len(words) < _MIN_WORDS or not part.endswith("."):
                continue
            word = words[-1][:-1]
            if len(word) >= _MIN_LETTERS and word.isalpha() and word.islower():
                yield " ".join(words[:-1]), word

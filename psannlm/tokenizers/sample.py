"""Texts of any number and length in, a bounded list of short passages out: what a tokenizer is fitted on."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Iterator

from psannlm.errors import CorpusError
from psannlm.tokenizers.base import refuse_surrogates

# SentencePiece drops longer sentences without a word, and BPE trainers need time quadratic in the longest word.
PASSAGE_CHARS = 4000
# More text hardly changes a vocabulary, but SentencePiece needs about 30 bytes and 8 microseconds for each character.
SAMPLE_CHARS = 8_000_000


def passages(text: str, limit: int = PASSAGE_CHARS) -> Iterator[str]:
    """Cut ``text`` into parts of at most ``limit`` characters that together are ``text``.

    A cut falls before the last newline of the second half of a part, else before its last space, else anywhere: a
    part then begins with the white space that belongs to its first word.
    """
    start = 0
    while len(text) - start > limit:
        earliest, latest = start + limit // 2, start + limit
        cut = text.rfind("\n", earliest, latest)
        if cut < 0:
            cut = text.rfind(" ", earliest, latest)
        if cut <= start:
            cut = latest
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


class PassageSample:
    """A uniform random choice of the passages of all texts added so far, ``budget`` characters at most.

    Each passage draws a number, and those with the highest are kept: every passage has the same chance, wherever it
    stands. Which are kept depends on ``seed`` and the texts alone; only they, and no others, are held.
    """

    def __init__(self, seed: int, budget: int = SAMPLE_CHARS) -> None:
        self._draw = random.Random(seed)
        self._budget = budget
        self._kept: list[tuple[float, int, str]] = []  # a heap, so that the passage to give up next stands first
        self._floor = -1.0  # the highest number that was given up: later passages must draw more
        self._held = 0
        self._count = 0
        self.total_chars = 0

    def add(self, text: str) -> None:
        """Let the passages of ``text`` take part."""
        for passage in passages(text):
            number = self._draw.random()
            self._count += 1
            self.total_chars += len(passage)
            if number <= self._floor:
                continue
            heapq.heappush(self._kept, (number, self._count, passage))
            self._held += len(passage)
            while self._held > self._budget and len(self._kept) > 1:
                self._floor, _, given_up = heapq.heappop(self._kept)
                self._held -= len(given_up)

    @property
    def held_chars(self) -> int:
        """Characters of the passages that are kept."""
        return self._held

    def passages(self) -> list[str]:
        """Return what is kept, in the order of the texts."""
        return [passage for _, _, passage in sorted(self._kept, key=lambda entry: entry[1])]

    def notice(self) -> str | None:
        """Return one line for people if something was left out."""
        if self._held == self.total_chars:
            return None
        return (
            f"the tokenizer is fitted on a random sample of {self._held:,} of the corpus's {self.total_chars:,} "
            "characters"
        )


def sample_passages(
    texts: Iterable[str], seed: int, *, budget: int = SAMPLE_CHARS, notice: Callable[[str], None] = lambda message: None
) -> list[str]:
    """Return passages of ``texts`` in their order: all, or a uniform random choice of ``budget`` characters in all.

    Reads ``texts`` once and holds no more than the choice and one text. The choice depends on texts and ``seed`` alone;
    ``notice`` is told of it.

    Raises:
        CorpusError: there is no text, or nothing but white space.
        TokenizerError: a text holds a lone surrogate.
    """
    sample = PassageSample(seed, budget)
    is_blank = True
    for number, text in enumerate([texts] if isinstance(texts, str) else texts):
        refuse_surrogates(text, f"text {number}")
        is_blank = is_blank and not text.strip()
        sample.add(text)
    if is_blank:
        found = "only white space" if sample.total_chars else "no text"
        raise CorpusError(f"cannot fit a tokenizer: the corpus holds {found}. Check the sources that are configured.")
    if said := sample.notice():
        notice(said)
    return sample.passages()

"""Random sample of passages on which a tokenizer is fitted, of bounded size."""

from __future__ import annotations

import heapq
import logging
import random
from collections.abc import Iterable, Iterator

from psannlm.errors import CorpusError
from psannlm.tokenizers.base import refuse_surrogates

log = logging.getLogger(__name__)

# SentencePiece silently drops longer sentences, and BPE trainers need time quadratic in the longest word.
PASSAGE_CHARS = 4000
# More text hardly changes a vocabulary, but SentencePiece needs about 30 bytes and 8 microseconds per character.
SAMPLE_CHARS = 8_000_000


def passages(text: str, limit: int = PASSAGE_CHARS) -> Iterator[str]:
    """Cut ``text`` into passages of at most ``limit`` characters, whose concatenation is ``text``.

    A cut is before the last newline of the second half of a passage, else before its last space, else at the limit, so
    that a passage begins with the white space that belongs to its first word.
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
    """Uniform random sample of the passages of all added texts, at most ``budget`` characters.

    Each passage gets a random number, and those with the highest numbers are kept, so that every passage has the same
    chance. The sample is a pure function of ``seed`` and the texts; only the sample is in memory.
    """

    def __init__(self, seed: int, budget: int = SAMPLE_CHARS) -> None:
        self._draw = random.Random(seed)
        self._budget = budget
        self._kept: list[tuple[float, int, str]] = []  # a heap: the passage to drop next is the first
        self._floor = -1.0  # highest number dropped so far: later passages need more
        self._held = 0
        self._count = 0
        self.total_chars = 0

    def add(self, text: str) -> None:
        """Add the passages of ``text``."""
        for passage in passages(text):
            number = self._draw.random()
            self._count += 1
            self.total_chars += len(passage)
            if number <= self._floor:
                continue
            heapq.heappush(self._kept, (number, self._count, passage))
            self._held += len(passage)
            while self._held > self._budget and len(self._kept) > 1:
                self._floor, _, dropped = heapq.heappop(self._kept)
                self._held -= len(dropped)

    @property
    def held_chars(self) -> int:
        """Number of characters in the sample."""
        return self._held

    def passages(self) -> list[str]:
        """Return the sample, in the order of the texts."""
        return [passage for _, _, passage in sorted(self._kept, key=lambda entry: entry[1])]

    def log_size(self, use: str = "the tokenizer is fitted on") -> None:
        """Log the size of the sample unless it is the whole corpus; ``use`` begins the message."""
        if self._held < self.total_chars:
            log.info(f"{use} a random sample of {self._held:,} of the corpus's {self.total_chars:,} characters")


def sample_passages(
    texts: Iterable[str], seed: int, *, budget: int = SAMPLE_CHARS, use: str = "the tokenizer is fitted on"
) -> list[str]:
    """Return the passages of ``texts`` in order: all, or a uniform random sample of ``budget`` characters in total.

    Reads ``texts`` once; the sample and one text are in memory. The sample is a pure function of texts and ``seed``;
    a message that begins with ``use`` is logged if it is not the whole corpus.

    Raises:
        CorpusError: there is no text, or only white space.
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
        raise CorpusError(f"cannot fit a tokenizer: the corpus holds {found}. Check the configured sources.")
    sample.log_size(use)
    return sample.passages()

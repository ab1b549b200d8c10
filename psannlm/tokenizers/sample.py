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
    draw = random.Random(seed)
    kept: list[tuple[float, int, str]] = []  # a heap, so that the passage to give up next stands first
    held = 0
    is_blank = True
    count = total = 0
    for number, text in enumerate([texts] if isinstance(texts, str) else texts):
        refuse_surrogates(text, f"text {number}")
        is_blank = is_blank and not text.strip()
        for passage in passages(text):
            heapq.heappush(kept, (draw.random(), count, passage))
            count += 1
            held += len(passage)
            total += len(passage)
            while held > budget and len(kept) > 1:
                held -= len(heapq.heappop(kept)[2])
    if is_blank:
        found = "only white space" if count else "no text"
        raise CorpusError(f"cannot fit a tokenizer: the corpus holds {found}. Check the sources that are configured.")
    if held < total:
        notice(f"the tokenizer is fitted on a random sample of {held:,} of the corpus's {total:,} characters")
    kept.sort(key=lambda entry: entry[1])
    return [passage for _, _, passage in kept]

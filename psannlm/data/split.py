"""The train/validation split, and the cuts of long texts: the rules shared by training and ``psannlm prep``.

Each of several documents is held out or not by its own text and the seed. Documents can therefore be decided while they
are streamed, equal documents are in the same split, and a growing corpus keeps its split. A single document is cut in
two; the cut depends on the bytes near it, so that a text of any size can be cut while it is streamed.

A long document is cut into segments that are encoded separately. Cuts depend on the text alone: a document gives the
same tokens as a file, as a line among others, as a whole or streamed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psannlm.data.order import shuffled, splitmix64

# Longer texts are encoded in segments, so that memory does not grow with their length.
SEGMENT_BYTES = 1 << 18
# Maximum distance of a cut from its target, and of the text that is held to decide it.
_REACH_BYTES = 1 << 16
_CHARACTER_BYTES = 4


@dataclass(frozen=True)
class CutRange:
    """Range of the cut of a text of ``n_bytes`` of UTF-8: near ``wanted``, from ``low`` to ``high``."""

    n_bytes: int
    low: int
    wanted: int
    high: int

    @classmethod
    def of(cls, n_bytes: int, val_split: float) -> CutRange:
        """Return the range for a text of which the last fraction ``val_split`` is held out."""
        wanted = max(0, min(max(1, round(n_bytes * (1 - val_split))), n_bytes - 1))
        reach = min(_REACH_BYTES, max(_CHARACTER_BYTES, min(wanted, n_bytes - wanted) // 10))
        return cls(n_bytes, max(0, wanted - reach), wanted, min(n_bytes, wanted + reach))

    @property
    def start(self) -> int:
        """Start of the bytes that determine the cut; they end at ``high``."""
        return max(0, self.low - 2)

    def find(self, window: bytes) -> int:
        """Return the cut, given the bytes from ``start`` to ``high``; 0 or ``n_bytes`` if the text cannot be cut.

        It is after the paragraph, else line, else word that ends nearest to ``wanted``, else between characters.
        """
        low, wanted, high = (max(1, self.low), self.wanted, min(self.n_bytes - 1, self.high))
        for boundary in (b"\n\n", b"\n", b" "):
            size = len(boundary)
            before = window.rfind(boundary, max(0, low - size - self.start), max(0, wanted - self.start))
            after = window.find(boundary, max(0, wanted - size + 1 - self.start), max(0, high - self.start))
            ends = [self.start + at + size for at in (before, after) if at >= 0]
            if ends:
                return min(ends, key=lambda end: (abs(end - wanted), end))
        return self._between_characters(window)

    def _between_characters(self, window: bytes) -> int:
        """Return the start of the character at or before ``wanted``, else of the first after it."""
        at = self.wanted
        while at > self.start and window[at - self.start] & 0xC0 == 0x80:
            at -= 1
        if at:
            return at
        at = min(1, self.n_bytes)
        while at < self.n_bytes and at - self.start < len(window) and window[at - self.start] & 0xC0 == 0x80:
            at += 1
        return at


def find_cut(text: bytes, val_split: float) -> int:
    """Return the position at which to cut a text in UTF-8 so that about ``val_split`` of it follows."""
    where = CutRange.of(len(text), val_split)
    return where.find(text[where.start : where.high])


def cut_text(text: str, val_split: float) -> tuple[str, str] | None:
    """Cut a text in two, the second about ``val_split`` of it; return None if one of them would be blank."""
    content = text.encode("utf-8")
    at = find_cut(content, val_split)
    first, last = content[:at].decode("utf-8"), content[at:].decode("utf-8")
    return (first, last) if first.strip() and last.strip() else None


def cut_blocks(blocks: Iterable[bytes], n_bytes: int, val_split: float) -> Iterator[Iterator[bytes]]:
    """Yield the blocks before and then the blocks after the :func:`find_cut` of a text that is read in ``blocks``.

    ``n_bytes``: length of the text. Exhaust the first iterator before asking for the second.
    """
    where = CutRange.of(n_bytes, val_split)
    source = iter(blocks)
    rest = b""

    def before() -> Iterator[bytes]:
        nonlocal rest
        done = 0
        for block in source:
            done += len(block)
            rest += block
            if done >= where.high:
                break
            # Bytes before the range are passed on; bytes that may determine the cut are held.
            if (free := len(rest) - max(0, done - where.start)) > 0:
                yield rest[:free]
                rest = rest[free:]
        first = done - len(rest)  # position of ``rest`` in the text
        at = where.find(rest[where.start - first : where.high - first])
        yield rest[: at - first]
        rest = rest[at - first :]

    def after() -> Iterator[bytes]:
        yield rest
        yield from source

    yield before()
    yield after()


def uniform_from_hash(hashes: NDArray[np.uint8], seed: int) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each document, (n,), a pure function of its text and ``seed``.

    ``hashes`` are those of ``framing.text_hash``, (n, 16). SplitMix64 mixes their first halves with the seed: equal
    documents get the same number.
    """
    words = np.ascontiguousarray(hashes).view("<u8")[:, 0]
    # The (seed + 1)-th step of the generator, which adds the golden ratio of 2**64 per step.
    mixed = splitmix64(words + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF))
    return np.asarray((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def held_out(hashes: NDArray[np.uint8], val_split: float, seed: int) -> NDArray[np.bool_]:
    """Return which of two or more documents are held out, (n,): those with a number below ``val_split``.

    Neither split is empty: otherwise the first document with the lowest number is held out, or the first with the
    highest is not. ``hashes``: as for :func:`uniform_from_hash`.
    """
    drawn = uniform_from_hash(hashes, seed)
    is_out = drawn < val_split
    if not is_out.any():
        is_out[np.argmin(drawn)] = True
    elif is_out.all():
        is_out[np.argmax(drawn)] = False
    return is_out


def held_out_by_number(n_documents: int, val_split: float, seed: int) -> NDArray[np.bool_]:
    """Return which documents are held out by the former rule, for runs that began with it; see :func:`held_out`."""
    n_held_out = min(max(1, round(val_split * n_documents)), n_documents - 1)
    is_out: NDArray[Any] = np.zeros(n_documents, np.bool_)
    is_out[shuffled(n_documents, seed, "validation split")[:n_held_out]] = True
    return is_out


def first_end(text: bytes | bytearray, limit: int = SEGMENT_BYTES) -> int:
    """Return the end of the first segment of ``text``, which is UTF-8 and longer than ``limit`` bytes.

    The cut is before the last newline of the second half of the segment, else before its last space, else between two
    characters, so that a segment begins with the white space that belongs to its first word.
    """
    for boundary in (b"\n", b" "):
        at = text.rfind(boundary, limit // 2, limit)
        if at > 0:
            return at
    # At most three bytes of a character may precede the cut; more continuation bytes are not UTF-8.
    for at in range(limit, max(0, limit - 4), -1):
        if text[at] & 0xC0 != 0x80:
            return at
    return limit


def cut_segments(text: bytes, limit: int = SEGMENT_BYTES) -> list[bytes]:
    """Return the segments of a whole text; their concatenation is the text."""
    segments = []
    start = 0
    while len(text) - start > limit:
        # A slice, so that an unsuccessful search reads one segment and not the whole rest.
        end = start + first_end(text[start : start + limit + 1], limit)
        segments.append(text[start:end])
        start = end
    segments.append(text[start:] if start else text)
    return segments


def cut_segment_stream(blocks: Iterable[bytes], limit: int = SEGMENT_BYTES) -> Iterator[tuple[bytes, bool]]:
    """Yield (segment, whether it is the last) of the concatenated blocks, as :func:`cut_segments` cuts them."""
    held = bytearray()
    for block in blocks:
        held += block
        while len(held) > limit:
            end = first_end(held, limit)
            yield bytes(held[:end]), False
            del held[:end]
    yield bytes(held), True

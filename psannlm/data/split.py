"""Which text is held out for validation: the one rule of training and of ``psannlm prep``.

Of several documents, each is held out or not by its own text and the seed, so that documents can be decided on while
they stream, equal ones fall on one side, and a corpus that grows keeps its split. A single document is cut in two;
the cut is decided by the bytes near it, so that a text of any size can be cut while it streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psannlm.data.order import shuffled, splitmix64

# A paragraph, line or word that ends farther from the wanted place is not looked for: so much text is held for a cut.
_REACH_BYTES = 1 << 16
_CHARACTER_BYTES = 4


@dataclass(frozen=True)
class CutRange:
    """Where the cut of a text of ``n_bytes`` of UTF-8 may fall: near ``wanted``, from ``low`` to ``high``."""

    n_bytes: int
    low: int
    wanted: int
    high: int

    @classmethod
    def of(cls, n_bytes: int, val_split: float) -> CutRange:
        """Return the range for a text whose last ``val_split`` is to be held out."""
        wanted = max(0, min(max(1, round(n_bytes * (1 - val_split))), n_bytes - 1))
        reach = min(_REACH_BYTES, max(_CHARACTER_BYTES, min(wanted, n_bytes - wanted) // 10))
        return cls(n_bytes, max(0, wanted - reach), wanted, min(n_bytes, wanted + reach))

    @property
    def start(self) -> int:
        """Where the text begins that the cut is decided by; it ends at ``high``."""
        return max(0, self.low - 2)

    def place(self, window: bytes) -> int:
        """Return the cut, given the bytes from ``start`` to ``high``; 0 or ``n_bytes`` if there is no place for one.

        It falls after the paragraph, else line, else word that ends nearest to ``wanted``, else between characters.
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
        """Return the place at or before ``wanted``, else after it, where a character begins."""
        at = self.wanted
        while at > self.start and window[at - self.start] & 0xC0 == 0x80:
            at -= 1
        if at:
            return at
        at = min(1, self.n_bytes)
        while at < self.n_bytes and at - self.start < len(window) and window[at - self.start] & 0xC0 == 0x80:
            at += 1
        return at


def cut_place(text: bytes, val_split: float) -> int:
    """Return where to cut a whole text, UTF-8, so that about ``val_split`` of it follows."""
    where = CutRange.of(len(text), val_split)
    return where.place(text[where.start : where.high])


def cut_text(text: str, val_split: float) -> tuple[str, str] | None:
    """Return a text in two parts, the last about ``val_split`` of it; None where one of them would be blank."""
    content = text.encode("utf-8")
    at = cut_place(content, val_split)
    first, last = content[:at].decode("utf-8"), content[at:].decode("utf-8")
    return (first, last) if first.strip() and last.strip() else None


def cut_blocks(blocks: Iterable[bytes], n_bytes: int, val_split: float) -> Iterator[Iterator[bytes]]:
    """Yield the blocks before and then the blocks after the :func:`cut_place` of a text that comes in ``blocks``.

    ``n_bytes`` is the length of the text. Each iterator must be used up before the next one is asked for.
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
            # What lies before the range is passed on; what may decide the cut is held.
            if (free := len(rest) - max(0, done - where.start)) > 0:
                yield rest[:free]
                rest = rest[free:]
        first = done - len(rest)  # of the text, where ``rest`` begins
        at = where.place(rest[where.start - first : where.high - first])
        yield rest[: at - first]
        rest = rest[at - first :]

    def after() -> Iterator[bytes]:
        yield rest
        yield from source

    yield before()
    yield after()


def uniform_from_hash(hashes: NDArray[np.uint8], seed: int) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each document, (n,), that depends on its text and ``seed`` alone.

    ``hashes`` are those of ``framing.text_hash``, (n, 16). SplitMix64 mixes their first halves with the seed: equal
    documents get the same number.
    """
    words = np.ascontiguousarray(hashes).view("<u8")[:, 0]
    # The (seed + 1)-th step of the generator, which adds the golden ratio of 2**64 per step.
    mixed = splitmix64(words + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF))
    return np.asarray((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def held_out(hashes: NDArray[np.uint8], val_split: float, seed: int) -> NDArray[np.bool_]:
    """Return which of two or more documents are held out, (n,): those that draw less than ``val_split``.

    Neither side is empty: where it would be, the first document that drew the lowest number is held out, or the first
    that drew the highest is not. ``hashes``: as for :func:`uniform_from_hash`.
    """
    drawn = uniform_from_hash(hashes, seed)
    is_out = drawn < val_split
    if not is_out.any():
        is_out[np.argmin(drawn)] = True
    elif is_out.all():
        is_out[np.argmax(drawn)] = False
    return is_out


def held_out_by_number(n_documents: int, val_split: float, seed: int) -> NDArray[np.bool_]:
    """Return which documents were held out before their text decided, for runs that began so: see :func:`held_out`."""
    n_held_out = min(max(1, round(val_split * n_documents)), n_documents - 1)
    is_out: NDArray[Any] = np.zeros(n_documents, np.bool_)
    is_out[shuffled(n_documents, seed, "validation split")[:n_held_out]] = True
    return is_out

"""Round-trip check of a tokenizer: does decoding the ids of a text give the text back?

A third-party tokenizer may lose text, which no later figure would show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from psannlm.tokenizers.base import Tokenizer

LOSSY = " (too low: lossy tokenizer)"
LOSSY_NOTE = " A lossy tokenizer does not give all of the text back: bits per byte come out too low."

# Only the beginning of a text is checked, and only the first of many texts: checking everything would double the work.
_CHARACTERS = 4096
_DOCUMENTS = 64
_SHOWN = 24
SMALLEST_FRACTION = 1e-6


class NamedText(Protocol):
    """Anything with a name and a text, such as a document of a corpus."""

    @property
    def name(self) -> str:
        """Its name in warnings."""

    @property
    def text(self) -> str:
        """The whole text."""


N = TypeVar("N", bound=NamedText)


@dataclass
class RoundTripMeter:
    """Counts the bytes of checked text and the bytes that the tokenizer does not give back."""

    checked_bytes: int = 0
    lost_bytes: int = 0

    def check(self, tokenizer: Tokenizer, text: str) -> str | None:
        """Check the first 4,096 characters of ``text``; return a description of the first difference, or None.

        A character is lost where fewer of it are decoded; if only the order changes, one byte counts as lost.

        Raises:
            TokenizerError: ``text`` holds a lone surrogate.
        """
        beginning = text[:_CHARACTERS]
        back = tokenizer.decode(tokenizer.encode(beginning))
        self.checked_bytes += len(beginning.encode("utf-8"))
        if back == beginning:
            return None
        missing = Counter(beginning) - Counter(back)
        self.lost_bytes += max(1, sum(len(char.encode("utf-8")) * count for char, count in missing.items()))
        return _describe(beginning, back)

    @property
    def fraction(self) -> float | None:
        """Fraction of the checked bytes that was lost, above 0 if any was; None if nothing was checked."""
        if self.lost_bytes == 0:
            return 0.0 if self.checked_bytes else None
        return min(1.0, max(SMALLEST_FRACTION, round(self.lost_bytes / max(1, self.checked_bytes), 6)))


def find_roundtrip_error(tokenizer: Tokenizer, text: str) -> str | None:
    """Return a description of the first round-trip error in the first 4,096 characters of ``text``, or None.

    Raises:
        TokenizerError: ``text`` holds a lone surrogate.
    """
    return RoundTripMeter().check(tokenizer, text)


def _describe(beginning: str, back: str) -> str:
    pairs = zip(beginning, back, strict=False)
    at = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(beginning), len(back)))
    start = max(0, at - _SHOWN // 2)
    return f"{beginning[start : start + _SHOWN]!r} comes back as {back[start : start + _SHOWN]!r}"


def check_roundtrip(
    tokenizer: Tokenizer,
    documents: Iterable[N],
    warn: Callable[[str], None],
    meter: RoundTripMeter | None = None,
) -> Iterator[N]:
    """Yield ``documents`` unchanged; call ``warn`` once if the beginning of one of the first 64 is not given back.

    ``meter`` counts the checked and the lost bytes.

    Raises:
        TokenizerError: a text holds a lone surrogate.
    """
    has_warned = False
    meter = meter or RoundTripMeter()
    for number, document in enumerate(documents):
        error = meter.check(tokenizer, document.text) if number < _DOCUMENTS else None
        if error is not None and not has_warned:
            warn(roundtrip_warning(document.name, error))
            has_warned = True
        yield document


def folder_warning(folder: str, fraction: float | None) -> str | None:
    """Return the warning for a prepared folder of which ``fraction`` of the text is lost; None if nothing is."""
    if not fraction:
        return None
    return (
        f"warning: {folder} was prepared with a tokenizer that loses text, {fraction:.2%} of the bytes that were "
        "checked; a model cannot learn what is lost, and bits per byte come out too low"
    )


def is_lossy(fraction: float | None) -> bool | None:
    """Return whether a tokenizer loses text, given the lost fraction; None if unknown."""
    return None if fraction is None else fraction > 0


def roundtrip_warning(name: str, error: str) -> str:
    """Return the warning for a document and its :func:`find_roundtrip_error`."""
    return (
        f"warning: this tokenizer loses text: in {name}, {error}; a model cannot learn what is lost, and bits per byte "
        "come out too low"
    )

"""Text and a tokenizer to what of it does not come back: a foreign tokenizer may lose text, and nobody would see it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from psannlm.tokenizers.base import Tokenizer

LOSSY = " (too low: lossy tokenizer)"
LOSSY_NOTE = " A lossy tokenizer does not give all of the text back: bits per byte come out too low."

# Of a text only its beginning is looked at, and of many texts only the first: to look at all would double the work.
_CHARACTERS = 4096
_DOCUMENTS = 64
_SHOWN = 24
SMALLEST_FRACTION = 1e-6


class NamedText(Protocol):
    """Anything with a name and a text, such as a document of a corpus."""

    @property
    def name(self) -> str:
        """What a warning calls it."""

    @property
    def text(self) -> str:
        """All of it."""


N = TypeVar("N", bound=NamedText)


@dataclass
class LossMeter:
    """Counts the bytes of text that was checked, and those that did not come back from the tokenizer."""

    checked_bytes: int = 0
    lost_bytes: int = 0

    def check(self, tokenizer: Tokenizer, text: str) -> str | None:
        """Count the first 4,096 characters of ``text``; return where they first come back as others, or None.

        A character is lost where fewer of it come back; text whose order alone changes loses one byte.

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
        """The fraction of the checked bytes that was lost, more than 0 if any was; None where nothing was checked."""
        if self.lost_bytes == 0:
            return 0.0 if self.checked_bytes else None
        return min(1.0, max(SMALLEST_FRACTION, round(self.lost_bytes / max(1, self.checked_bytes), 6)))


def find_loss(tokenizer: Tokenizer, text: str) -> str | None:
    """Return where the first 4,096 characters of ``text`` first come back as others, in words, or None.

    Raises:
        TokenizerError: ``text`` holds a lone surrogate.
    """
    return LossMeter().check(tokenizer, text)


def _describe(beginning: str, back: str) -> str:
    pairs = zip(beginning, back, strict=False)
    at = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(beginning), len(back)))
    start = max(0, at - _SHOWN // 2)
    return f"{beginning[start : start + _SHOWN]!r} comes back as {back[start : start + _SHOWN]!r}"


def watch_for_loss(
    tokenizer: Tokenizer,
    documents: Iterable[N],
    tell: Callable[[str], None],
    meter: LossMeter | None = None,
) -> Iterator[N]:
    """Yield ``documents`` as they are, and tell once if the beginning of one of the first 64 does not come back.

    ``meter`` counts what was checked and lost.

    Raises:
        TokenizerError: a text holds a lone surrogate.
    """
    is_told = False
    meter = meter or LossMeter()
    for number, document in enumerate(documents):
        loss = meter.check(tokenizer, document.text) if number < _DOCUMENTS else None
        if loss is not None and not is_told:
            tell(loss_warning(document.name, loss))
            is_told = True
        yield document


def folder_warning(folder: str, fraction: float | None) -> str | None:
    """Return the warning for a prepared folder whose manifest records ``fraction`` as lost; None where nothing was."""
    if not fraction:
        return None
    return (
        f"warning: {folder} was prepared with a tokenizer that loses text, {fraction:.2%} of the bytes that were "
        "checked; a model cannot learn what is lost, and bits per byte come out too low"
    )


def is_lossy(fraction: float | None) -> bool | None:
    """Return whether a tokenizer loses text, by the fraction that it was seen to lose; None where nobody looked."""
    return None if fraction is None else fraction > 0


def loss_warning(name: str, loss: str) -> str:
    """Return the warning for a document and what :func:`find_loss` said of it."""
    return (
        f"warning: this tokenizer loses text: in {name}, {loss}; a model cannot learn what is lost, and bits per byte "
        "come out too low"
    )

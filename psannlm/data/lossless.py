"""Text and a tokenizer to what of it does not come back: a foreign tokenizer may lose text, and nobody would see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from psannlm.data.documents import Document
from psannlm.tokenizers.base import Tokenizer

# Of a text only its beginning is looked at, and of many texts only the first: to look at all would double the work.
_CHARACTERS = 4096
_DOCUMENTS = 64
_SHOWN = 24


def find_loss(tokenizer: Tokenizer, text: str) -> str | None:
    """Return where the first 4,096 characters of ``text`` first come back as others, in words, or None.

    Raises:
        TokenizerError: ``text`` holds a lone surrogate.
    """
    beginning = text[:_CHARACTERS]
    back = tokenizer.decode(tokenizer.encode(beginning))
    if back == beginning:
        return None
    pairs = zip(beginning, back, strict=False)
    at = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(beginning), len(back)))
    start = max(0, at - _SHOWN // 2)
    return f"{beginning[start : start + _SHOWN]!r} comes back as {back[start : start + _SHOWN]!r}"


def watch_for_loss(
    tokenizer: Tokenizer, documents: Iterable[Document], tell: Callable[[str], None]
) -> Iterator[Document]:
    """Yield ``documents`` as they are, and tell once if the beginning of one of the first 64 does not come back.

    Raises:
        TokenizerError: a text holds a lone surrogate.
    """
    is_told = False
    for number, document in enumerate(documents):
        if not is_told and number < _DOCUMENTS and (loss := find_loss(tokenizer, document.text)) is not None:
            tell(loss_warning(document.name, loss))
            is_told = True
        yield document


def loss_warning(name: str, loss: str) -> str:
    """Return the warning for a document and what :func:`find_loss` said of it."""
    return (
        f"warning: this tokenizer loses text: in {name}, {loss}; a model cannot learn what is lost, and bits per byte "
        "come out too low"
    )

"""Encoded documents as flat arrays: ids enter one group of documents at a time, a :class:`TokenStore` leaves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psannlm.data.documents import Document
from psannlm.tokenizers.base import Tokenizer

# A group is large enough to keep the tokenizer's threads busy, small enough that its Python lists of ids stay cheap.
_GROUP_CHARACTERS = 1 << 21
_GROUP_DOCUMENTS = 4096


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Return the narrowest type of a token file that holds every id below ``vocab_size``."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


@dataclass(frozen=True)
class TokenStore:
    """Documents as ids, end to end, no specials among them.

    ``tokens``: (n_tokens,) uint16 or uint32, in memory or memory-mapped; document ``d`` is
    ``tokens[offsets[d]:offsets[d + 1]]``. ``offsets``: (n_documents + 1,) int64. ``doc_bytes``: (n_documents,) int64,
    the UTF-8 length of each text, which turns a loss per token into bits per byte.
    """

    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    names: tuple[str, ...]
    doc_bytes: NDArray[np.int64]

    @property
    def n_tokens(self) -> int:
        """Ids of all documents together."""
        return int(self.offsets[-1])

    @property
    def n_documents(self) -> int:
        """Number of documents, those without any token among them."""
        return len(self.offsets) - 1

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all documents together."""
        return int(self.doc_bytes.sum())

    @property
    def n_framed_tokens(self) -> int:
        """Ids once each document stands between a begin and an end of text."""
        return self.n_tokens + 2 * self.n_documents

    def document(self, index: int) -> NDArray[Any]:
        """Return the ids of one document, as a view."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def store_from_ids(
    documents: Iterable[Sequence[int]],
    vocab_size: int,
    names: Sequence[str] | None = None,
    doc_bytes: Sequence[int] | None = None,
) -> TokenStore:
    """Return a store of documents that are ids already; bytes default to zero, names to ``text 1`` and on."""
    dtype = token_dtype(vocab_size)
    chunks = [np.asarray(ids, dtype=dtype) for ids in documents]
    return _assemble(chunks, [len(chunk) for chunk in chunks], dtype, names, doc_bytes)


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> TokenStore:
    """Encode documents a group at a time and return them as one store; two bytes a token are held, not two objects.

    Raises:
        TokenizerError: a document is not Unicode text.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    chunks: list[NDArray[Any]] = []
    lengths: list[int] = []
    names: list[str] = []
    doc_bytes: list[int] = []
    for group in _groups(documents):
        encoded = tokenizer.encode_batch([document.text for document in group])
        chunks.extend(np.asarray(ids, dtype=dtype) for ids in encoded)
        lengths.extend(len(ids) for ids in encoded)
        names.extend(document.name for document in group)
        doc_bytes.extend(document.n_bytes for document in group)
        # One array per group rather than per document: a million short lines would be a million array headers.
        chunks[-len(group) :] = [np.concatenate(chunks[-len(group) :])]
    return _assemble(chunks, lengths, dtype, names, doc_bytes)


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.text)
        if characters >= _GROUP_CHARACTERS or len(group) >= _GROUP_DOCUMENTS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _assemble(
    chunks: Sequence[NDArray[Any]],
    lengths: Sequence[int],
    dtype: type[np.uint16] | type[np.uint32],
    names: Sequence[str] | None,
    doc_bytes: Sequence[int] | None,
) -> TokenStore:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return TokenStore(
        tokens=np.concatenate(chunks) if chunks else np.zeros(0, dtype=dtype),
        offsets=offsets,
        names=tuple(names) if names is not None else tuple(f"text {i + 1}" for i in range(len(lengths))),
        doc_bytes=np.asarray(doc_bytes if doc_bytes is not None else np.zeros(len(lengths)), dtype=np.int64),
    )

"""Token store in memory: documents encoded as one framed stream, in the narrowest integer type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psannlm.data.corpus.documents import Document
from psannlm.data.framing import frame
from psannlm.data.split import SEGMENT_BYTES, cut_segments
from psannlm.tokenizers.base import Tokenizer

# Large enough to keep the threads of the tokenizer busy, small enough for the arrays of ids to be cheap.
_GROUP_CHARACTERS = 1 << 21
_GROUP_DOCUMENTS = 4096


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Return the narrowest token type that holds every id below ``vocab_size``: uint16 or uint32."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


@dataclass(frozen=True)
class InMemoryTokens:
    """Concatenated documents as ids in memory, each between BOS and EOS: a ``stream.Stream``.

    ``framed``: (n_framed_tokens,) uint16 or uint32; document ``d`` is ``framed[offsets[d]:offsets[d + 1]]``.
    ``offsets``: (n_documents + 1,) int64. ``doc_bytes``: (n_documents,) int64, the UTF-8 length of each text, which
    turns a loss per token into bits per byte.
    """

    framed: NDArray[Any]
    offsets: NDArray[np.int64]
    names: tuple[str, ...]
    doc_bytes: NDArray[np.int64]

    @property
    def segments(self) -> tuple[InMemoryTokens, ...]:
        """Itself: a store in memory is one piece."""
        return (self,)

    @property
    def n_framed_tokens(self) -> int:
        """Number of ids of all documents, including BOS and EOS."""
        return int(self.offsets[-1])

    @property
    def n_documents(self) -> int:
        """Number of documents, including empty ones."""
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        """Number of ids of the texts, without BOS and EOS."""
        return self.n_framed_tokens - 2 * self.n_documents

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all documents together."""
        return int(self.doc_bytes.sum())

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Return a slice of the stream, as a view."""
        return self.framed[start:stop]

    def starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the starts of documents; that after the last is the end of the stream."""
        return self.offsets[start:stop]

    def documents_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the document at each position, in the shape of ``positions``."""
        return np.searchsorted(self.offsets, positions, side="right") - 1

    def length_counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the distinct framed lengths of documents, ascending, and the number of each."""
        return np.unique(np.diff(self.offsets), return_counts=True)

    def name(self, document: int) -> str:
        """Return the name of a document."""
        return self.names[document]

    def document(self, index: int) -> NDArray[Any]:
        """Return the ids of one document without its frame, as a view."""
        return self.framed[self.offsets[index] + 1 : self.offsets[index + 1] - 1]


def store_from_ids(
    documents: Iterable[Sequence[int]],
    vocab_size: int,
    *,
    bos_id: int,
    eos_id: int,
    names: Sequence[str] | None = None,
    doc_bytes: Sequence[int] | None = None,
) -> InMemoryTokens:
    """Return a store of documents given as ids; bytes default to zero, names to ``text 1``, ``text 2`` and so on."""
    dtype = token_dtype(vocab_size)
    ids = [np.asarray(document, dtype=dtype) for document in documents]
    lengths = np.array([len(document) for document in ids], dtype=np.int64)
    chunk = frame(
        np.concatenate(ids) if ids else np.zeros(0, dtype), lengths, bos_id=bos_id, eos_id=eos_id, dtype=dtype
    )
    named = [f"text {i + 1}" for i in range(len(ids))] if names is None else names
    return _assemble([chunk], dtype, named, [0] * len(ids) if doc_bytes is None else doc_bytes)


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, *, in_segments: bool = True
) -> InMemoryTokens:
    """Encode documents in groups and return them as one store; a token takes two or four bytes.

    A long document is encoded in segments, like in ``psannlm prep``, which gives the same ids; without ``in_segments``,
    as a whole.

    Raises:
        TokenizerError: a document is not Unicode text.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    chunks: list[tuple[NDArray[Any], NDArray[np.int64]]] = []
    names: list[str] = []
    doc_bytes: list[int] = []
    for group in _groups(documents):
        ids, lengths = _encoded(group, tokenizer) if in_segments else tokenizer.encode_flat([d.text for d in group])
        chunks.append(frame(ids, lengths, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, dtype=dtype))
        names.extend(document.name for document in group)
        doc_bytes.extend(document.n_bytes for document in group)
    return _assemble(chunks, dtype, names, doc_bytes)


def _encoded(group: Sequence[Document], tokenizer: Tokenizer) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the concatenated ids of a group of documents, and the number of ids of each, (n_documents,)."""
    texts: list[str] = []
    firsts: list[int] = []
    for document in group:
        firsts.append(len(texts))
        # A character has at most four bytes: most documents are known to be short without encoding them.
        if 4 * len(document.text) <= SEGMENT_BYTES:
            texts.append(document.text)
        else:
            texts += [part.decode("utf-8") for part in cut_segments(document.text.encode("utf-8"))]
    ids, lengths = tokenizer.encode_flat(texts)
    return ids, np.add.reduceat(lengths, firsts)


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
    chunks: Sequence[tuple[NDArray[Any], NDArray[np.int64]]],
    dtype: type[np.uint16] | type[np.uint32],
    names: Sequence[str],
    doc_bytes: Sequence[int],
) -> InMemoryTokens:
    return InMemoryTokens(
        framed=np.concatenate([np.zeros(0, dtype=dtype), *(tokens for tokens, _ in chunks)]),
        offsets=np.cumsum(np.concatenate([np.zeros(1, dtype=np.int64), *(lengths for _, lengths in chunks)])),
        names=tuple(names),
        doc_bytes=np.asarray(doc_bytes, dtype=np.int64),
    )

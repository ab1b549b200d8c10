"""Protocols of token stores, in memory or in shards on disk.

The stream is the concatenation of all framed documents, each with BOS and EOS. Positions in it and documents are
numbered from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Segment(Protocol):
    """A part of a stream with whole documents, such as a shard."""

    @property
    def n_framed_tokens(self) -> int:
        """Number of ids of all documents, including BOS and EOS."""
        ...

    @property
    def n_documents(self) -> int:
        """Number of documents, including empty ones."""
        ...

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Return the ids at positions ``start`` to ``stop`` (exclusive), uint16 or uint32, read-only."""
        ...

    def starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the starts of documents ``start`` to ``stop`` (exclusive); that after the last is the stream's end."""
        ...

    def documents_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the document at each position, in the shape of ``positions``."""
        ...

    def length_counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the distinct framed lengths of documents, ascending, and the number of each; both (n_lengths,)."""
        ...


class Stream(Segment, Protocol):
    """All documents of the training or the validation split."""

    @property
    def segments(self) -> Sequence[Segment]:
        """Its segments in order; a store without segments is its own only segment."""
        ...

    @property
    def n_tokens(self) -> int:
        """Number of ids of the texts, without BOS and EOS."""
        ...

    @property
    def n_bytes(self) -> int:
        """Number of UTF-8 bytes of all texts."""
        ...

    def name(self, document: int) -> str:
        """Return the name of a document: its file, and line or row."""
        ...

"""What a store of framed documents promises, whether it lies in memory or in shards on disk.

The framed stream is all documents end to end, each with its begin and end of text. Places in it and documents are
numbered from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Segment(Protocol):
    """A piece of a stream that holds whole documents."""

    @property
    def n_framed_tokens(self) -> int:
        """Ids of all documents, each begin and end of text among them."""
        ...

    @property
    def n_documents(self) -> int:
        """Number of documents, those without any text among them."""
        ...

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Return the ids at places ``start`` to ``stop`` (exclusive), uint16 or uint32; not to be written to."""
        ...

    def starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return where documents ``start`` to ``stop`` (exclusive) start; one past the last is the stream's end."""
        ...

    def documents_at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the document that each place belongs to, in the shape of ``places``."""
        ...

    def length_counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the framed lengths that documents have, rising, and how many have each; both (n_lengths,)."""
        ...


class Stream(Segment, Protocol):
    """All documents of a training or a validation part."""

    @property
    def segments(self) -> Sequence[Segment]:
        """The pieces that make it up, in order; one that is whole has itself."""
        ...

    @property
    def n_tokens(self) -> int:
        """Ids of the texts alone, no begin or end of text among them."""
        ...

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        ...

    def name(self, document: int) -> str:
        """Return in words where a document comes from."""
        ...

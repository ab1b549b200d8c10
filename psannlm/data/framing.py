"""Framing of documents with BOS and EOS, and the record kept of each document: length, bytes, hash, origin.

A framed document is BOS, its ids, EOS. This is the only place where BOS and EOS are inserted: readers of a stream take
slices of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

HASH_BYTES = 16
RECORD_BITS = 40
_SOURCE_BITS = 23


@dataclass(frozen=True)
class DocumentBatch:
    """Consecutive framed documents.

    ``tokens``: (n_tokens,) uint16 or uint32, the documents end to end; a document longer than memory may begin in one
    batch and end in a later one. The other arrays describe the documents that end in this batch: ``lengths``: (n,)
    int64, tokens of each with BOS and EOS;
    ``n_bytes``: (n,) int64, UTF-8 bytes of each text; ``hashes``: (n, 16) uint8, :func:`text_hash` of each;
    ``origins``: (n,) int64, :func:`pack_origin` of each.
    """

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    hashes: NDArray[np.uint8]
    origins: NDArray[np.int64]

    def check_arrays(self) -> None:
        """Raise ValueError unless the four arrays describe the same number of documents, each with a frame."""
        n = len(self.lengths)
        shapes = (self.n_bytes.shape, self.hashes.shape, self.origins.shape)
        if shapes != ((n,), (n, HASH_BYTES), (n,)):
            raise ValueError(f"{n} lengths beside n_bytes, hashes and origins of shapes {shapes}")
        if n and int(self.lengths.min()) < 2:
            raise ValueError("a document of fewer than 2 tokens has no frame")


def frame(
    ids: NDArray[Any],
    lengths: NDArray[np.int64],
    *,
    bos_id: int,
    eos_id: int,
    dtype: DTypeLike,
    begins: NDArray[np.bool_] | None = None,
    ends: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return concatenated units of text with ``bos_id`` before and ``eos_id`` after each document, and their lengths.

    Args:
        ids: (n_ids,), the units concatenated; every id must fit ``dtype``.
        lengths: (n_units,), ids of each unit. A unit is a document, or a segment of one.
        begins, ends: (n_units,), whether a document begins (ends) in each unit; None: in every unit.
    """
    n_ids = np.asarray(lengths, dtype=np.int64)
    begins = np.ones(len(n_ids), dtype=np.bool_) if begins is None else begins
    ends = np.ones(len(n_ids), dtype=np.bool_) if ends is None else ends
    framed = n_ids + begins + ends
    stops = np.cumsum(framed)
    first, last = (stops - framed)[begins], stops[ends] - 1
    tokens = np.empty(int(framed.sum()), dtype=dtype)
    is_text = np.ones(len(tokens), dtype=np.bool_)
    is_text[first] = is_text[last] = False
    tokens[is_text] = ids
    tokens[first], tokens[last] = bos_id, eos_id
    return tokens, framed


def text_hash(content: bytes) -> bytes:
    """Return the 16-byte hash of a text in UTF-8: BLAKE2b, 128 bits."""
    return hashlib.blake2b(content, digest_size=HASH_BYTES).digest()


def pack_origin(source: int, record: int) -> int:
    """Return the origin of a document as one number: index of the source, and line or row from 1 (0: a whole file).

    Raises:
        ValueError: more than 8,388,607 sources, or more than 2**40 - 1 records in one.
    """
    if not 0 <= source < 1 << _SOURCE_BITS or not 0 <= record < 1 << RECORD_BITS:
        raise ValueError(f"source {source}, record {record} exceeds the range of an origin")
    return source << RECORD_BITS | record


def unpack_origin(origin: int) -> tuple[int, int]:
    """Return (source, record) of an origin from :func:`pack_origin`."""
    return origin >> RECORD_BITS, origin & ((1 << RECORD_BITS) - 1)

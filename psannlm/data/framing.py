"""Ids of documents enter; the framed stream leaves, with what is kept of each document beside its tokens.

A framed document is its begin of text, its ids, its end of text. Framing happens here and nowhere else: whoever reads
a stream later takes slices of it.
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
    ids: NDArray[Any], lengths: NDArray[np.int64], *, bos_id: int, eos_id: int, dtype: DTypeLike
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return documents end to end, each between ``bos_id`` and ``eos_id``, and the framed length of each.

    ``ids``: (n_ids,), the documents end to end; ``lengths``: (n_documents,), ids of each. Every id must fit ``dtype``.
    """
    framed = np.asarray(lengths, dtype=np.int64) + 2
    ends = np.cumsum(framed)
    tokens = np.empty(len(ids) + 2 * len(framed), dtype=dtype)
    is_text = np.ones(len(tokens), dtype=bool)
    is_text[ends - framed] = False
    is_text[ends - 1] = False
    tokens[is_text] = ids
    tokens[ends - framed] = bos_id
    tokens[ends - 1] = eos_id
    return tokens, framed


def text_hash(content: bytes) -> bytes:
    """Return the 16 bytes that tell one text (in UTF-8) from another: BLAKE2b, 128 bits."""
    return hashlib.blake2b(content, digest_size=HASH_BYTES).digest()


def pack_origin(source: int, record: int) -> int:
    """Return where a document comes from as one number: the source's index, and its line or row from 1 (0: a file).

    Raises:
        ValueError: more than 8,388,607 sources, or more than 2**40 - 1 records in one.
    """
    if not 0 <= source < 1 << _SOURCE_BITS or not 0 <= record < 1 << RECORD_BITS:
        raise ValueError(f"source {source}, record {record} is beyond what an origin holds")
    return source << RECORD_BITS | record


def unpack_origin(origin: int) -> tuple[int, int]:
    """Return (source, record) of what :func:`pack_origin` made."""
    return origin >> RECORD_BITS, origin & ((1 << RECORD_BITS) - 1)

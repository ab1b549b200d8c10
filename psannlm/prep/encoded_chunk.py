"""File of the tokens of one chunk: written atomically by a worker, checked by hashes when it is read.

An encoded chunk is a list of units. A unit is a document, or one segment of a long document. Its tokens include BOS
where the document begins and EOS where it ends, so that concatenated units are framed documents.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psannlm.data.framing import HASH_BYTES
from psannlm.errors import ArtifactError
from psannlm.io.atomic import explain_write_errors, read_head, temporary_beside
from psannlm.prep.chunks import BEGINS, ENDS

_MAGIC = b"psannpc1"
_HEADER_START = b'{"payload":'
_PREFIX = struct.Struct("<8s16sI")
# One row per unit. A unit is at most a segment, so four bytes are enough for its tokens, bytes and characters.
UNIT = np.dtype(
    [
        ("n_tokens", "<u4"),
        ("n_bytes", "<u4"),
        ("n_chars", "<u4"),
        ("flags", "u1"),
        ("origin", "<i8"),
        ("hash", "u1", (HASH_BYTES,)),
    ]
)


@dataclass(frozen=True)
class EncodedChunk:
    """``units``: (n_units,) of ``UNIT``. ``tokens``: (n_tokens,) in the shards' dtype. ``facts``: counts and examples.

    ``payload`` is the SHA-256 of the bytes of the chunk.
    """

    units: NDArray[Any]
    tokens: NDArray[Any]
    payload: str
    facts: Mapping[str, Any]

    @property
    def begins(self) -> NDArray[np.bool_]:
        """Whether a document begins in each unit."""
        return (self.units["flags"] & BEGINS) > 0

    @property
    def ends(self) -> NDArray[np.bool_]:
        """Whether a document ends in each unit."""
        return (self.units["flags"] & ENDS) > 0


def encoded_chunk_path(folder: Path, index: int) -> Path:
    """Return the path of encoded chunk ``index``."""
    return folder / f"piece_{index:08d}"


def encoded_chunk_parts(encoded: EncodedChunk) -> tuple[bytes, ...]:
    """Return the content of the file of an encoded chunk, as parts to be joined."""
    units, tokens = encoded.units.tobytes(), encoded.tokens.tobytes()
    head = {
        "payload": encoded.payload,
        "dtype": encoded.tokens.dtype.name,
        "n_units": len(encoded.units),
        "n_tokens": len(encoded.tokens),
        "tokens_digest": _digest(tokens),
        "facts": dict(encoded.facts),
    }
    header = json.dumps(head, separators=(",", ":")).encode("ascii")
    prefix = _PREFIX.pack(_MAGIC, bytes.fromhex(_digest(header, units)), len(header))
    return prefix, header, units, tokens


def write_encoded_chunk(path: Path, *parts: bytes | memoryview) -> int:
    """Write the parts of an encoded chunk to a temporary file and rename it; return the bytes written.

    It is not flushed to the disk: a file that a power cut leaves half-written does not match its hashes, and its
    chunk is encoded again. The folder must exist: a worker that outlives its run must not create it again.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    n_bytes = 0
    with explain_write_errors(path), temporary_beside(path) as temporary:
        with open(temporary, "wb") as file:
            for part in parts:
                n_bytes += file.write(part)
        os.replace(temporary, path)
    return n_bytes


def is_encoded_chunk(path: Path) -> bool:
    """Return whether the file begins as an encoded chunk does; one damaged part of its head is tolerated."""
    head = read_head(path, _PREFIX.size + len(_HEADER_START))
    return head.startswith(_MAGIC) or head[_PREFIX.size :] == _HEADER_START


def read_encoded_chunk(path: Path, *, with_tokens: bool = True) -> EncodedChunk:
    """Read an encoded chunk and check its hashes; without ``with_tokens`` only its head is read.

    Raises:
        ArtifactError: the file is missing, truncated or damaged.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            magic, digest, header_bytes = _PREFIX.unpack(file.read(_PREFIX.size))
            if magic != _MAGIC or header_bytes > size:
                raise ArtifactError(f"{path} is damaged: it is not an encoded chunk")
            header = file.read(header_bytes)
            head = _head(path, header)
            units = file.read(min(size, head["n_units"] * UNIT.itemsize))
            if _digest(header, units) != digest.hex():
                raise ArtifactError(f"{path} is damaged: its head does not match its hash")
            dtype = np.dtype(head["dtype"])
            if size != file.tell() + head["n_tokens"] * dtype.itemsize:
                raise ArtifactError(f"{path} is damaged: its size, {size:,} bytes, does not match its head")
            content = file.read() if with_tokens else b""
    except (OSError, struct.error) as error:
        raise ArtifactError(f"cannot read {path}: {error}") from error
    if with_tokens and _digest(content) != head["tokens_digest"]:
        raise ArtifactError(f"{path} is damaged: its tokens do not match their hash")
    return EncodedChunk(np.frombuffer(units, UNIT), np.frombuffer(content, dtype), head["payload"], head["facts"])


def _head(path: Path, header: bytes) -> dict[str, Any]:
    """Return the fields of a header whose hash is not yet checked. Raises ArtifactError if it cannot be parsed."""
    try:
        head = json.loads(header)
        if isinstance(head, dict) and 0 <= head["n_units"] < 1 << 40 and 0 <= head["n_tokens"] < 1 << 40:
            return head
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: its header cannot be read") from error
    raise ArtifactError(f"{path} is damaged: its header cannot be read")


def _digest(*contents: bytes) -> str:
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for content in contents:
        digest.update(content)
    return digest.hexdigest()

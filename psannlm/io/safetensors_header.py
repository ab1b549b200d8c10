"""The head of a safetensors file: made from a table of tensors, and read back from a file that nobody vouches for.

The format is eight bytes of length (little endian), that many bytes of JSON, then the tensors' bytes with no gap
between them. Nothing here loads torch or safetensors, and nothing is allocated that the file does not hold.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from psannlm.errors import ArtifactError
from psannlm.io.lfs_pointers import POINTER_BYTES, pointer_in
from psannlm.io.limits import MAX_HEADER_VALUES, json_values

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 64 << 20
_ITEM_BYTES = {"U8": 1, "U16": 2, "U32": 4, "I64": 8}


def build_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], n_bytes: int
) -> bytes:
    """Return the head, ``n_bytes`` long, of a file that holds ``tensors`` (name: type and shape) in that order.

    Types are U8, U16, U32 and I64. Equal arguments give equal bytes.

    Raises:
        ValueError: ``n_bytes`` are too few.
    """
    fields: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + _ITEM_BYTES[dtype] * math.prod(shape)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8").ljust(n_bytes - LENGTH_BYTES)
    if LENGTH_BYTES + len(text) > n_bytes:
        raise ValueError(f"a header of {LENGTH_BYTES + len(text)} bytes does not fit into {n_bytes}")
    return struct.pack("<Q", len(text)) + text


# A zip archive, and a bare pickle of protocol 2 and later: what torch.save has written, now and formerly.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def read_header(path: Path, file: BinaryIO, size: int, limit: int = MAX_HEADER_BYTES) -> bytes:
    """Return the head of a file of ``size`` bytes, its eight bytes of length included.

    Raises:
        ArtifactError: the file is a pointer (Git LFS) or cut short, or its head would be longer than the file or
            ``limit``.
    """
    if size <= POINTER_BYTES:
        file.seek(0)
        if problem := pointer_in(file.read(size)):
            raise ArtifactError(f"{path}: {problem}")
    if size < LENGTH_BYTES:
        raise ArtifactError(f"{path} is cut short: {size} bytes")
    file.seek(0)
    prefix = file.read(LENGTH_BYTES)
    (length,) = struct.unpack("<Q", prefix)
    if length > limit or LENGTH_BYTES + length > size:
        # Only here: a header of 640 bytes has the first two bytes of a pickle.
        if prefix.startswith(_PICKLES):
            raise ArtifactError(
                f"{path} was written by torch.save; psannlm reads safetensors files alone, because a pickle can run "
                "code. Save the model with psannLM.save, or train it again"
            )
        raise ArtifactError(f"{path} is cut short or no safetensors file: {size:,} bytes, header of {length:,}")
    return prefix + file.read(length)


def parse_header(path: Path, header: bytes) -> dict[str, Any]:
    """Return the JSON table of a head. Raises ArtifactError if it is none."""
    if (n_values := json_values(header)) > MAX_HEADER_VALUES:
        raise ArtifactError(f"{path}: its header has up to {n_values:,} values, more than {MAX_HEADER_VALUES:,}")
    try:
        fields = json.loads(header[LENGTH_BYTES:])
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged or no safetensors file: its header is not JSON") from error
    if not isinstance(fields, dict):
        raise ArtifactError(f"{path} is damaged or no safetensors file: its header is not a table")
    return fields


def refuse_wrong_length(path: Path, size: int, header_bytes: int, fields: Mapping[str, Any]) -> None:
    """Raise ArtifactError unless the tensors of a head end where the file of ``size`` bytes ends."""
    try:
        ends = [entry["data_offsets"][1] for name, entry in fields.items() if name != "__metadata__"]
    except (TypeError, KeyError, IndexError) as error:
        raise ArtifactError(f"{path} is damaged: its header does not say where the tensors are") from error
    if not all(isinstance(end, int) and 0 <= end < 1 << 63 for end in ends):
        raise ArtifactError(f"{path} is damaged: its header does not say where the tensors end")
    promised = header_bytes + max(ends, default=0)
    if promised > size:
        raise ArtifactError(f"{path} is cut short: {size:,} of {promised:,} bytes are there")
    if promised < size:
        raise ArtifactError(f"{path} is damaged: {size - promised:,} bytes too long")


def parse_metadata(path: Path, fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of a head as a table of its own. Raises ArtifactError if there is none."""
    metadata = fields.get("__metadata__")
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ArtifactError(f"{path} has no metadata of ours: it is not a psannlm file")
    return dict(metadata)


def file_metadata(path: Path, limit: int = MAX_HEADER_BYTES) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file, empty for any other file, link or folder.

    For telling whose a file is: nothing but the header is read, and nothing of it is checked.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return {}
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        return {}
    with open(handle, "rb") as file:
        try:
            return parse_metadata(path, parse_header(path, read_header(path, file, found.st_size, limit)))
        except ArtifactError:
            return {}

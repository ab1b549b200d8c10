"""Header of safetensors files: building it, and parsing it from untrusted files.

The format is the length of the header in 8 bytes (little endian), the header as JSON, then the bytes of the tensors
without gaps. Nothing here imports torch or safetensors, or allocates more memory than the size of the file.
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
from psannlm.io.platform_files import SAFE_FLAGS

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 64 << 20
# The element types that psannlm writes, with their sizes.
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "I64": 8}
_ITEM_BYTES |= {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


def build_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], n_bytes: int | None = None
) -> bytes:
    """Return the header of a file that holds ``tensors`` (name: element type and shape) in that order.

    It is padded with spaces to ``n_bytes``, by default to a multiple of 8. Equal arguments give equal bytes.

    Raises:
        ValueError: the header is longer than ``n_bytes``.
    """
    fields: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + _ITEM_BYTES[dtype] * math.prod(shape)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    if n_bytes is None:
        n_bytes = LENGTH_BYTES + -(-len(text) // LENGTH_BYTES) * LENGTH_BYTES
    text = text.ljust(n_bytes - LENGTH_BYTES)
    if LENGTH_BYTES + len(text) > n_bytes:
        raise ValueError(f"a header of {LENGTH_BYTES + len(text)} bytes does not fit into {n_bytes}")
    return struct.pack("<Q", len(text)) + text


# First bytes of files of torch.save: a zip archive, formerly a pickle of protocol 2 or later.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def read_header(path: Path, file: BinaryIO, size: int, limit: int = MAX_HEADER_BYTES) -> bytes:
    """Return the header of a file of ``size`` bytes, including the 8 bytes of its length.

    Raises:
        ArtifactError: the file is a Git LFS pointer or truncated, or its header is longer than the file or ``limit``.
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
        # Checked only now: a valid header of 640 bytes begins with the first two bytes of a pickle.
        if prefix.startswith(_PICKLES):
            raise ArtifactError(
                f"{path} was written by torch.save; psannlm reads only safetensors files, because a pickle can run "
                "code. Save the model with psannLM.save, or train it again"
            )
        raise ArtifactError(f"{path} is cut short or is not a safetensors file: {size:,} bytes, header of {length:,}")
    return prefix + file.read(length)


def parse_header(path: Path, header: bytes) -> dict[str, Any]:
    """Return the fields of a header. Raises ArtifactError if it is not a JSON object."""
    if (n_values := json_values(header)) > MAX_HEADER_VALUES:
        raise ArtifactError(f"{path}: its header has up to {n_values:,} values, more than {MAX_HEADER_VALUES:,}")
    try:
        fields = json.loads(header[LENGTH_BYTES:])
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged or is not a safetensors file: its header is not JSON") from error
    if not isinstance(fields, dict):
        raise ArtifactError(f"{path} is damaged or is not a safetensors file: its header is not a JSON object")
    return fields


def refuse_wrong_length(path: Path, size: int, header_bytes: int, fields: Mapping[str, Any]) -> None:
    """Raise ArtifactError unless the tensors end at the end of the file, ``size`` bytes."""
    try:
        ends = [entry["data_offsets"][1] for name, entry in fields.items() if name != "__metadata__"]
    except (TypeError, KeyError, IndexError) as error:
        raise ArtifactError(f"{path} is damaged: its header does not give the positions of the tensors") from error
    if not all(isinstance(end, int) and 0 <= end < 1 << 63 for end in ends):
        raise ArtifactError(f"{path} is damaged: its header does not give the ends of the tensors")
    expected = header_bytes + max(ends, default=0)
    if expected > size:
        raise ArtifactError(f"{path} is cut short: {size:,} of {expected:,} bytes are there")
    if expected < size:
        raise ArtifactError(f"{path} is damaged: {size - expected:,} bytes too long")


def read_fields(path: Path) -> tuple[dict[str, Any], int]:
    """Return the parsed header of a file, checked against its size, and the bytes of its tensors, which are not read.

    Raises:
        ArtifactError: the file cannot be read, or as :func:`read_header`, :func:`parse_header` and
            :func:`refuse_wrong_length`.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = read_header(path, file, size)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    fields = parse_header(path, header)
    refuse_wrong_length(path, size, len(header), fields)
    return fields, size - len(header)


def parse_shapes(path: Path, fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a header. Raises ArtifactError if a shape does not match its bytes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, entry in fields.items():
        if name == "__metadata__":
            continue
        try:
            shape = tuple(entry["shape"])
            start, end = entry["data_offsets"]
            is_right = math.prod(shape) * _ITEM_BYTES[entry["dtype"]] == end - start >= 0
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} is damaged: its header does not describe {name!r:.80}") from error
        if not is_right or not all(type(n) is int and n >= 0 for n in shape):
            raise ArtifactError(f"{path} is damaged: the shape of {name!r:.80} does not match its bytes")
        shapes[name] = shape
    return shapes


def parse_metadata(path: Path, fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of a header. Raises ArtifactError if there is none."""
    metadata = fields.get("__metadata__")
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ArtifactError(f"{path} has no psannlm metadata: it is not a psannlm file")
    return dict(metadata)


def file_metadata(path: Path, limit: int = MAX_HEADER_BYTES) -> dict[str, str]:
    """Return the metadata of a safetensors file; empty for any other file, link or folder.

    Used to find out who wrote a file: only the header is read, and nothing is verified.
    """
    try:
        handle = os.open(path, os.O_RDONLY | SAFE_FLAGS)
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

"""Reading and writing of safetensors files with a SHA-256 that covers every byte.

safetensors runs no code but does not detect a flipped bit. Here the header's metadata holds the hash of the whole file,
computed with the 64 digits of the hash set to zeros; other readers of safetensors ignore it. Where a file lists shards
(``models/tensorshards.py``), reading it includes them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from psannlm.errors import ArtifactError
from psannlm.io.atomic import replacing
from psannlm.io.filenames import utf8_path
from psannlm.io.lfs_pointers import refuse_pointer
from psannlm.io.safetensors_header import (
    build_header,
    file_metadata,
    parse_header,
    parse_metadata,
    parse_shapes,
    read_fields,
    read_header,
    refuse_wrong_length,
)
from psannlm.io.self_hash import BLANK, HASH_KEY, hash_position, hash_with_blank
from psannlm.models.tensorshards import (
    SHARDS_KEY,
    has_shards,
    listed_shards,
    read_layout,
    read_shards,
    verify_shards,
    write_shards,
)

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorFile:
    """Content of a file: tensors by name (on the CPU), and the header's metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Verified:
    """The header's metadata of a file whose bytes match ``sha256``, the hash that it records of itself."""

    metadata: dict[str, str]
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> str:
    """Write ``tensors`` and ``metadata`` to ``path`` atomically and return the SHA-256 recorded in the file.

    Tensors are written one after the other, so that at most one is copied at any time. Equal content gives equal files.

    If tensors are sharded over ranks, every rank must call it with a ``path`` in a new folder that all of them see.
    They write their shards beside ``path`` at the same time (``models/tensorshards.py``), and rank 0 then writes
    ``path``, which lists them; the other ranks return an empty text.

    Raises:
        StorageError: the disk is full or the folder cannot be written; a previous file at ``path`` is unchanged.
    """
    if not has_shards(tensors):
        return _write_whole(path, tensors, metadata)
    shards = write_shards(path, tensors)
    if dist.get_rank() != 0:
        return ""
    return _write_whole(path, {}, {**metadata, SHARDS_KEY: json.dumps(shards, sort_keys=True)})


def _write_whole(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> str:
    layout = {name: (_DTYPES[tensors[name].dtype], tuple(tensors[name].shape)) for name in _file_order(tensors)}
    header = build_header(layout, {**metadata, HASH_KEY: BLANK})
    digest = hashlib.sha256(header)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(header)
        for name in _file_order(tensors):
            content = tensors[name].detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(content)
            file.write(content)
        file.seek(hash_position(path, header))
        file.write(digest.hexdigest().encode("ascii"))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names in the order of safetensors: wide dtypes first, which aligns every tensor, then by name."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def read_tensors(path: Path) -> TensorFile:
    """Read a file that :func:`write_tensors` wrote, after checking every byte of it.

    Raises:
        ArtifactError: the file is missing, truncated, damaged, or not such a file. No code from it is run, and no more
            memory is allocated than the file fills.
    """
    path = Path(path)
    verified = verify_tensors(path)
    if shards := listed_shards(path, verified.metadata):
        return TensorFile(read_shards(shards), verified.metadata)
    try:
        with utf8_path(path) as readable:
            tensors = load_file(readable)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path}: its tensors cannot be read: {error}") from error
    return TensorFile(tensors, verified.metadata)


@dataclass(frozen=True)
class Head:
    """Unverified header of a file and of its shards: metadata, shapes by name, bytes of all tensors."""

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    n_bytes: int


def read_head(path: Path) -> Head:
    """Read the header and check it against the size of the file; nothing is hashed.

    Raises:
        ArtifactError: as :func:`read_tensors`, or a shape does not match its number of bytes.
    """
    fields, n_bytes = read_fields(path)
    metadata = parse_metadata(path, fields)
    if shards := listed_shards(path, metadata):
        layout = read_layout(shards)
        return Head(metadata, layout.shapes, layout.n_bytes)
    return Head(metadata, parse_shapes(path, fields), n_bytes)


def stored_bytes(path: Path) -> int:
    """Return the size of a file and its shards; 0 for a file that is missing. Nothing is read of the tensors.

    Raises:
        ArtifactError: a shard is missing.
    """
    if not path.is_file():
        return 0
    shards = listed_shards(path, file_metadata(path))
    return path.stat().st_size + sum(file.stat().st_size for file in shards)


def verify_tensors(path: Path) -> Verified:
    """Check the hash of a file, and of its shards, without loading the tensors. Raises as :func:`read_tensors`."""
    path = Path(path)
    try:
        if not path.is_file():
            refuse_pointer(path, ArtifactError)
            raise ArtifactError(f"{path} does not exist or is not a file")
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = read_header(path, file, size)
        fields = parse_header(path, header)
        refuse_wrong_length(path, size, len(header), fields)
        metadata = parse_metadata(path, fields)
        recorded = metadata.pop(HASH_KEY, None)
        if recorded is None:
            raise ArtifactError(f"{path} records no {HASH_KEY}: it is not a psannlm file")
        found = hash_with_blank(path, hash_position(path, header))
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    if recorded != found:
        raise ArtifactError(
            f"{path} is damaged: its bytes hash to {found[:12]}, the recorded hash is {str(recorded)[:12]}"
        )
    verify_shards(listed_shards(path, metadata))
    return Verified(metadata, found)


def same_shapes(tensors: dict[str, Tensor], expected: dict[str, torch.Size]) -> str | None:
    """Return what differs between the names and shapes of two sets of tensors, or None."""
    for name, shape in expected.items():
        if name not in tensors:
            return f"{name} is missing"
        if tensors[name].shape != shape:
            return f"{name} is {tuple(tensors[name].shape)}, not {tuple(shape)}"
    extra = sorted(set(tensors) - set(expected))
    return f"{extra[0]} is not part of the model" if extra else None

"""Named tensors to one safetensors file and back, with a SHA-256 that covers every byte of it.

safetensors runs no code but does not notice a flipped bit. Here the header's metadata holds the hash of the whole file,
taken with the 64 digits of the hash themselves written as zeros; any other reader of safetensors ignores it.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from psannlm.errors import ArtifactError, StorageError
from psannlm.storage import replacing
from psannlm.tensorheader import LENGTH_BYTES, parse_header, parse_metadata, read_header, refuse_wrong_length

_HASH_KEY = "sha256"
_BLANK = "0" * 64
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class TensorFile:
    """A file that has been read: tensors by name (on the CPU), and the header's metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Verified:
    """The header's metadata of a file whose bytes match ``sha256``, the hash that it records of itself."""

    metadata: dict[str, str]
    sha256: str


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Write ``tensors`` and ``metadata`` to ``path`` atomically and return the SHA-256 recorded in the file.

    Raises:
        StorageError: the disk is full or the folder cannot be written; ``path`` keeps its former content.
    """
    flat = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(flat, temporary, metadata={**metadata, _HASH_KEY: _BLANK})
        except SafetensorError as error:
            _raise_as_os_error(temporary, flat, error)
        # safetensors makes files that only their owner may read; this one is as open as any other the user makes.
        temporary.chmod(mode)
        with open(temporary, "r+b") as file:
            header = _sorted_header(read_header(temporary, file, os.fstat(file.fileno()).st_size))
            file.seek(0)
            file.write(header)
            file.flush()
            at = _hash_position(temporary, header)
            digest = _hash_with_blank(temporary, at)
            file.seek(at)
            file.write(digest.encode("ascii"))
            file.flush()
            os.fsync(file.fileno())
    return digest


def _sorted_header(header: bytes) -> bytes:
    """safetensors writes metadata in an order that chance decides; in this one, equal content gives equal files."""
    fields = json.loads(header[LENGTH_BYTES:])
    fields["__metadata__"] = dict(sorted(fields["__metadata__"].items()))
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    return header[:LENGTH_BYTES] + text.ljust(len(header) - LENGTH_BYTES)


def _raise_as_os_error(path: Path, tensors: dict[str, Tensor], error: SafetensorError) -> None:
    """safetensors wraps the system's refusal in its own error; probe the folder to get the system's own words back."""
    needed = sum(t.numel() * t.element_size() for t in tensors.values())
    with open(path, "wb") as file:
        for _ in range(0, needed, _CHUNK_BYTES):
            file.write(bytes(_CHUNK_BYTES))
        file.flush()
        os.fsync(file.fileno())
    raise StorageError(f"could not write {path}: {error}") from error


def read_tensors(path: Path) -> TensorFile:
    """Read a file that :func:`write_tensors` wrote, after checking every byte of it.

    Raises:
        ArtifactError: the file is missing, cut short, damaged, or not such a file. No code from it is ever run, and no
            memory is allocated that the file does not fill.
    """
    verified = verify_tensors(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path} holds no readable tensors: {error}") from error
    return TensorFile(tensors, verified.metadata)


def verify_tensors(path: Path) -> Verified:
    """Check the hash of a file, not loading the tensors. Raises as :func:`read_tensors` does."""
    path = Path(path)
    try:
        if not path.is_file():
            raise ArtifactError(f"{path} does not exist or is not a file")
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = read_header(path, file, size)
        fields = parse_header(path, header)
        refuse_wrong_length(path, size, len(header), fields)
        metadata = parse_metadata(path, fields)
        recorded = metadata.pop(_HASH_KEY, None)
        if recorded is None:
            raise ArtifactError(f"{path} records no {_HASH_KEY}: it is not a psannlm file")
        found = _hash_with_blank(path, _hash_position(path, header))
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    if recorded != found:
        raise ArtifactError(
            f"{path} is damaged: its bytes hash to {found[:12]}, it was written with {str(recorded)[:12]}"
        )
    return Verified(metadata, found)


def _hash_position(path: Path, header: bytes) -> int:
    marker = f'"{_HASH_KEY}":"'.encode("ascii")
    at = header.find(marker)
    if at < 0 or at + len(marker) + len(_BLANK) > len(header):
        raise ArtifactError(f"{path} records no whole {_HASH_KEY}: it is damaged or not a psannlm file")
    return at + len(marker)


def _hash_with_blank(path: Path, at: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(at))
        digest.update(_BLANK.encode("ascii"))
        file.seek(at + len(_BLANK))
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def same_shapes(tensors: dict[str, Tensor], expected: dict[str, torch.Size]) -> str | None:
    """Return what differs between the names and shapes of two sets of tensors, or None."""
    for name, shape in expected.items():
        if name not in tensors:
            return f"{name} is missing"
        if tensors[name].shape != shape:
            return f"{name} is {tuple(tensors[name].shape)}, not {tuple(shape)}"
    extra = sorted(set(tensors) - set(expected))
    return f"{extra[0]} is not part of the model" if extra else None

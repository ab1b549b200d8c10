"""Shards of a tensor file: safetensors files that all ranks write in parallel, and that one process reads as a whole.

The tensors of ``model.safetensors`` of a sharded model are in the files of ``model/``, one or more for each rank, as
torch's distributed checkpoint (DCP) writes them for Hugging Face: ordinary safetensors, with the position of each shard
in the header's metadata, and no pickle. ``model.safetensors`` itself holds no tensors; its metadata lists the files and
the SHA-256 of each, so that its own hash covers them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from psannlm.errors import ArtifactError, RankError, StorageError
from psannlm.io.atomic import explain_write_errors, is_plain_file, is_plain_folder, sha256_file, sync_file
from psannlm.io.filenames import utf8_path
from psannlm.io.limits import MAX_HEADER_VALUES, json_values
from psannlm.io.safetensors_header import file_metadata, parse_metadata, parse_shapes, read_fields
from psannlm.runtime.distributed import as_sharded, gather_bytes

# Key of the metadata of a tensor file: a JSON object with the SHA-256 of each of its shards by file name.
SHARDS_KEY = "shards"
# Names and metadata that torch gives to the files of its Hugging Face storage.
_NAME = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")
_PLACES_KEY, _OFFSETS_KEY = "DCP_SHARDING_INFO", "saved_offsets"
# Bytes of tensors from which a rank begins another file.
_FILE_BYTES = 1 << 28


def shard_folder(path: Path) -> Path:
    """Return the folder with the shards of the tensor file at ``path``: ``model/`` beside ``model.safetensors``."""
    return path.with_suffix("")


def has_only_shards(path: Path) -> bool:
    """Whether the folder beside the tensor file at ``path`` holds its shards, valid or damaged, and nothing else.

    A shard is a file that the tensor file lists, or one with the metadata of a shard.
    """
    folder = shard_folder(path)
    listed = file_metadata(path).get(SHARDS_KEY, "")
    return is_plain_folder(folder) and all(
        _NAME.fullmatch(file.name) is not None
        and is_plain_file(file)
        and (f'"{file.name}"' in listed or _PLACES_KEY in file_metadata(file))
        for file in folder.iterdir()
    )


def has_shards(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any of ``tensors`` is sharded over ranks."""
    return any(as_sharded(tensor) is not None for tensor in tensors.values())


def write_shards(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write the shards of ``tensors`` beside ``path``, each rank its own; return the SHA-256 of each file by its name.

    Every rank must call it, with tensors of the same names, and a folder that all ranks see. Each rank hashes the file
    that it wrote. Which tensors a file holds does not depend on their order, which a resumed run may change.

    Raises:
        StorageError: this rank could not write. Its files are removed.
        RankError: another rank could not write.
    """
    problem, digests = "", {}
    try:
        digests = _write_own_shards(shard_folder(path), tensors)
    except StorageError as error:
        problem = str(error)
    # A rank that failed takes part in the exchange too: no other rank waits for it without end, and rank 0 removes the
    # folder that all of them write to when none of them does any more.
    device = next(sharded.device for tensor in tensors.values() if (sharded := as_sharded(tensor)) is not None)
    content = json.dumps({"problem": problem, "digests": digests}).encode("ascii")
    answers = [json.loads(answer) for answer in gather_bytes(content, device)]
    if problem:
        raise StorageError(problem)
    for rank, answer in enumerate(answers):
        if answer["problem"]:
            raise RankError(f"rank {rank}: {answer['problem']}", StorageError.exit_code)
    return {name: digest for answer in answers for name, digest in answer["digests"].items()}


def _write_own_shards(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write the shards of this rank into ``folder``; return the SHA-256 of each file by its name.

    Raises:
        StorageError: they could not be written. None of them is left: the space may be needed to report the error.
    """
    # DCP takes half a second to import.
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.planner import SavePlan

    rank = dist.get_rank()
    ordered = sorted(tensors.items(), key=lambda named: named[0])
    own = {name: tensor for number, (name, tensor) in enumerate(ordered) if _is_written_here(number, tensor)}
    pattern = f"shard-{rank + 1:05d}-*"
    # The steps of torch.distributed.checkpoint.save but for its exchange of plans, which sends pickles between ranks:
    # who writes what follows from the tensors.
    with explain_write_errors(folder):
        try:
            writer = HuggingFaceStorageWriter(str(folder), _file_numbers(own), save_distributed=True)
            planner = DefaultSavePlanner()
            planner.set_up_planner(own, is_coordinator=rank == 0)
            writer.set_up_storage_writer(is_coordinator=rank == 0)
            plan = writer.prepare_local_plan(planner.create_local_plan())
            # Its place in this list is the number in the names of its files.
            plan = writer.prepare_global_plan([*(SavePlan([]) for _ in range(rank)), plan])[rank]
            writer.write_data(planner.finish_plan(plan), planner).wait()
            digests = {file.name: sha256_file(file) for file in sorted(folder.glob(pattern))}
            sync_file(folder)
        except OSError:
            for file in folder.glob(pattern):
                with suppress(OSError):
                    file.unlink()
            raise
    return digests


def _file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int] | None:
    """Return the number of the file of each tensor, from 1; None if there are none.

    Torch holds the content of a file in memory three times.
    """
    numbers: dict[str, int] = {}
    number, n_bytes = 1, 0
    for name, tensor in tensors.items():
        sharded = as_sharded(tensor)
        n_bytes += (tensor if sharded is None else sharded.to_local()).nbytes
        numbers[name] = number
        if n_bytes >= _FILE_BYTES:
            number, n_bytes = number + 1, 0
    return numbers or None


def _is_written_here(number: int, tensor: Tensor) -> bool:
    """Whether this rank writes its part of tensor ``number``; ranks with copies of it take turns."""
    sharded = as_sharded(tensor)
    if sharded is None:
        return number % dist.get_world_size() == dist.get_rank()
    mesh = sharded.device_mesh
    return all(
        not placement.is_replicate() or number % mesh.size(dim) == mesh.get_local_rank(dim)
        for dim, placement in enumerate(sharded.placements)
    )


def listed_shards(path: Path, metadata: Mapping[str, str]) -> dict[Path, str]:
    """Return the shards that the metadata of the tensor file at ``path`` list, with their SHA-256; empty for none.

    Raises:
        ArtifactError: the list is damaged, or one of the files is missing.
    """
    text = metadata.get(SHARDS_KEY)
    if text is None:
        return {}
    listed = _parse(path, SHARDS_KEY, text)
    if not all(_NAME.fullmatch(name) and isinstance(digest, str) for name, digest in listed.items()):
        raise ArtifactError(f"{path} is damaged: its list of shards does not name files and their hashes")
    files = {shard_folder(path) / name: digest for name, digest in listed.items()}
    if missing := [file for file in files if not is_plain_file(file)]:
        raise ArtifactError(
            f"{missing[0]} is missing: {path.name} of a sharded model needs the files of {shard_folder(path).name}/ "
            "beside it; copy the whole checkpoint folder"
        )
    return files


def _parse(path: Path, key: str, text: str) -> dict[str, Any]:
    """Return the JSON object under ``key`` of the metadata of a file. Raises ArtifactError if it is none."""
    try:
        content = json.loads(text) if json_values(text.encode("utf-8")) <= MAX_HEADER_VALUES else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} is damaged: {key} in its header is not a JSON object")
    return content


def verify_shards(files: Mapping[Path, str]) -> None:
    """Check every file against its hash.

    Raises:
        ArtifactError: one is damaged or cannot be read.
    """
    for file, recorded in files.items():
        try:
            found = sha256_file(file)
        except OSError as error:
            raise ArtifactError(f"cannot read {file}: {error.strerror or error}") from error
        if found != recorded:
            raise ArtifactError(
                f"{file} is damaged: its bytes hash to {found[:12]}, the recorded hash is {recorded[:12]}"
            )


@dataclass(frozen=True)
class _Rows:
    """A shard of a tensor: its file, its first row and its shape."""

    file: Path
    first: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ShardLayout:
    """Shapes of the full tensors, their bytes, and which rows each file holds, read from the headers."""

    shapes: dict[str, tuple[int, ...]]
    n_bytes: int
    rows: dict[str, list[_Rows]] = field(repr=False)


def read_layout(files: Mapping[Path, str]) -> ShardLayout:
    """Read the headers of the shards. Nothing is hashed, and no tensor is read.

    Raises:
        ArtifactError: a header is damaged, or the shards of a tensor do not make up all of its rows, each once.
    """
    rows: dict[str, list[_Rows]] = {}
    n_bytes = 0
    for file in files:
        fields, size = read_fields(file)
        n_bytes += size
        places = _parse(file, _PLACES_KEY, parse_metadata(file, fields).get(_PLACES_KEY, ""))
        for name, shape in parse_shapes(file, fields).items():
            first = _first_row(file, name, shape, places.get(name))
            rows.setdefault(name, []).append(_Rows(file, first, shape, fields[name]["dtype"]))
    return ShardLayout({name: _full_shape(name, parts) for name, parts in rows.items()}, n_bytes, rows)


def _first_row(file: Path, name: str, shape: tuple[int, ...], place: object) -> int:
    offsets = place.get(_OFFSETS_KEY) if isinstance(place, dict) else None
    is_whole = isinstance(offsets, list) and all(type(offset) is int and offset >= 0 for offset in offsets)
    if not isinstance(offsets, list) or not is_whole or len(offsets) != len(shape) or any(offsets[1:]):
        raise ArtifactError(f"{file} is damaged: {name!r:.80} is not a shard of whole rows")
    return offsets[0] if offsets else 0


def _full_shape(name: str, parts: list[_Rows]) -> tuple[int, ...]:
    """Sort the shards of a tensor by their rows, and return the shape that they make up."""
    parts.sort(key=lambda part: (part.first, math.prod(part.shape)))
    end = 0
    for part in parts:
        is_alike = part.shape[1:] == parts[0].shape[1:] and part.dtype == parts[0].dtype
        if part.first != end or not is_alike or (not part.shape and len(parts) > 1):
            raise ArtifactError(f"{part.file} is damaged: the shards of {name!r:.80} do not fit together")
        end += part.shape[0] if part.shape else 0
    return (end, *parts[0].shape[1:]) if parts[0].shape else ()


def read_shards(files: Mapping[Path, str]) -> dict[str, Tensor]:
    """Return the full tensors that the shards make up, on the CPU; the files must have been verified.

    Raises:
        ArtifactError: as :func:`read_layout`, or a file cannot be read.
    """
    layout = read_layout(files)
    tensors: dict[str, Tensor] = {}
    places = {(part.file, name): part for name, parts in layout.rows.items() for part in parts}
    for file in files:
        try:
            with utf8_path(file) as readable, safe_open(readable, framework="pt") as handle:
                for name in handle.keys():
                    shard: Tensor = handle.get_tensor(name)
                    part = places[file, name]
                    if tuple(shard.shape) != part.shape:
                        raise ValueError(f"{name!r:.80} has two shapes")
                    if name not in tensors:
                        tensors[name] = torch.empty(layout.shapes[name], dtype=shard.dtype)
                    rows = slice(part.first, part.first + part.shape[0]) if part.shape else ...
                    tensors[name][rows] = shard
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ArtifactError(f"{file}: its tensors cannot be read: {error}") from error
    return tensors

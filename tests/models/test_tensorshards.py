"""Shards of a tensor file, without ranks: what they make up, and files that contradict each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from psannlm.errors import ArtifactError
from psannlm.models.tensorfile import read_head, read_tensors, stored_bytes, verify_tensors, write_tensors
from psannlm.models.tensorshards import has_only_shards

FULL = {"a": torch.arange(20.0).reshape(5, 4), "b": torch.tensor(3.0), "c": torch.arange(3), "d": torch.zeros(0, 2)}
# Five rows on three ranks, and a rank without any row of them.
PARTS: list[dict[str, tuple[list[int], torch.Tensor]]] = [
    {"a": ([0, 0], FULL["a"][:2]), "b": ([], FULL["b"])},
    {"a": ([2, 0], FULL["a"][2:4]), "d": ([0, 0], FULL["d"])},
    {"a": ([4, 0], FULL["a"][4:]), "c": ([0], FULL["c"])},
    {"a": ([5, 0], FULL["a"][5:])},
]
Parts = list[dict[str, tuple[list[int], torch.Tensor]]]


def name_of(rank: int) -> str:
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def write(path: Path, parts: Parts, **listed: str) -> Path:
    """Write shards as torch does, and the file that lists them; ``listed`` adds to its list."""
    folder = path.with_suffix("")
    folder.mkdir()
    hashes = {}
    for rank, part in enumerate(parts):
        places = {name: {"saved_offsets": offsets} for name, (offsets, _) in part.items()}
        file = folder / name_of(rank)
        tensors = {name: tensor.contiguous() for name, (_, tensor) in part.items()}
        save_file(tensors, file, {"DCP_SHARDING_INFO": json.dumps(places), "format": "pt"})
        hashes[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    write_tensors(path, {}, {"shards": json.dumps({**hashes, **listed}), "kind": "test"})
    return path


def test_shards_make_up_the_full_tensors(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", PARTS)
    content = read_tensors(path)
    assert content.tensors.keys() == FULL.keys()
    for name, value in FULL.items():
        assert torch.equal(content.tensors[name], value)
        assert content.tensors[name].dtype == value.dtype
    head = read_head(path)
    assert head.shapes == {name: tuple(value.shape) for name, value in FULL.items()}
    assert head.n_bytes == sum(value.nbytes for value in FULL.values())
    assert stored_bytes(path) == sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert has_only_shards(path)


def changed(**changes: Any) -> Callable[[Parts], Parts]:
    """Return a change of the second rank's shard of ``a``."""

    def change(parts: Parts) -> Parts:
        offsets, value = parts[1]["a"]
        new = (changes.get("offsets", offsets), changes.get("value", value))
        return [parts[0], {**parts[1], "a": new}, *parts[2:]]

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed(offsets=[1, 0]),  # a row twice
        changed(offsets=[3, 0]),  # a gap
        changed(offsets=[2, 1]),  # columns
        changed(offsets=[2]),
        changed(offsets=[-1, 0]),
        changed(offsets=[2.0, 0]),
        changed(offsets="20"),
        changed(value=torch.zeros(1, 4)),
        changed(value=torch.zeros(2, 3)),
        changed(value=torch.zeros(2, 4, dtype=torch.float16)),
        changed(value=torch.zeros(2, 4, 1), offsets=[2, 0, 0]),
        lambda parts: [*parts, {"b": ([], torch.tensor(4.0))}],
        lambda parts: parts[1:],
    ],
)
def test_shards_that_contradict_each_other_are_refused(tmp_path: Path, change: Callable[[Parts], Parts]) -> None:
    path = write(tmp_path / "model.safetensors", change(PARTS))
    verify_tensors(path)
    for read in (read_tensors, read_head):
        with pytest.raises(ArtifactError, match="damaged"):
            read(path)


@pytest.mark.parametrize("listed", ["../other.safetensors", "shard-1.safetensors", "/etc/passwd", ""])
def test_list_of_shards_names_only_shards(tmp_path: Path, listed: str) -> None:
    path = write(tmp_path / "model.safetensors", PARTS, **{listed: "0" * 64})
    with pytest.raises(ArtifactError, match="list of shards"):
        verify_tensors(path)


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, '{"a": 1}'])
def test_damaged_list_of_shards_is_refused(tmp_path: Path, text: str) -> None:
    write_tensors(tmp_path / "model.safetensors", {}, {"shards": text})
    with pytest.raises(ArtifactError, match="damaged"):
        read_tensors(tmp_path / "model.safetensors")


def test_every_byte_of_a_shard_is_covered(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", PARTS)
    file = path.with_suffix("") / name_of(2)
    content = file.read_bytes()
    for at in (0, 20, len(content) - 1):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ArtifactError, match=file.name):
            verify_tensors(path)
        assert has_only_shards(path)
    file.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=file.name):
        verify_tensors(path)


def test_missing_shard_is_named_with_the_remedy(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", PARTS)
    file = path.with_suffix("") / name_of(1)
    moved = file.rename(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=rf"{file.name} is missing.*copy the whole checkpoint folder"):
        read_tensors(path)
    file.symlink_to(moved)  # a link is not the file that was written
    with pytest.raises(ArtifactError, match="is missing"):
        read_tensors(path)
    assert not has_only_shards(path)


@pytest.mark.parametrize("name", ["notes.txt", "shard-00009-model-00001-of-00001.safetensors"])
def test_folder_with_another_file_is_not_own(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "model.safetensors", PARTS)
    (path.with_suffix("") / name).write_bytes(b"mine")
    assert not has_only_shards(path)

"""Tensor files: round trip, a hash over every byte, compatibility with safetensors, hostile headers."""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from psannlm.errors import ArtifactError
from psannlm.models.tensorfile import read_tensors, same_shapes, verify_tensors, write_tensors

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor(3, dtype=torch.int64),
    "c": torch.zeros(0, 4),
    "d": torch.arange(5).to(torch.bfloat16),
}
METADATA = {"format": "test", "quotes": '"sha256":"' + "0" * 64, "é": "\n\t\u2028🙂"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "t.safetensors"


def test_tensorfile_roundtrip(path: Path) -> None:
    digest = write_tensors(path, TENSORS, METADATA)
    content = read_tensors(path)
    assert content.metadata == METADATA
    assert content.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert content.tensors[name].dtype == tensor.dtype
        assert torch.equal(content.tensors[name], tensor)
    assert verify_tensors(path).sha256 == digest
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_tensorfile_writes_views_by_value(path: Path) -> None:
    base = torch.arange(12.0, requires_grad=True).reshape(3, 4)
    write_tensors(path, {"transposed": base.t(), "part": base[1:2, ::2]}, {})
    content = read_tensors(path).tensors
    assert torch.equal(content["transposed"], base.detach().t())
    assert torch.equal(content["part"], base.detach()[1:2, ::2])


def test_tensorfile_empty_roundtrip(path: Path) -> None:
    write_tensors(path, {}, {})
    assert read_tensors(path).tensors == {}


def test_tensorfile_equal_content_gives_equal_files(path: Path, tmp_path: Path) -> None:
    assert write_tensors(path, TENSORS, METADATA) == write_tensors(tmp_path / "other", TENSORS, METADATA)
    assert path.read_bytes() == (tmp_path / "other").read_bytes()


def test_tensorfile_is_readable_by_safetensors(path: Path) -> None:
    write_tensors(path, TENSORS, METADATA)
    found = load_file(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata().items() >= METADATA.items()
        assert file.get_tensor("a").tolist() == TENSORS["a"].tolist()


def test_tensorfile_hash_covers_file_with_blanked_digits(path: Path) -> None:
    """As documented, so that a file can be checked with any tool."""
    digest = write_tensors(path, TENSORS, {"format": "test"})
    content = path.read_bytes()
    assert content.count(digest.encode()) == 1
    assert hashlib.sha256(content.replace(digest.encode(), b"0" * 64)).hexdigest() == digest


def test_tensorfile_has_default_permissions(path: Path) -> None:
    write_tensors(path, TENSORS, {})
    other = path.with_name("other")
    other.write_text("x", encoding="utf-8")
    assert stat.filemode(path.stat().st_mode) == stat.filemode(other.stat().st_mode)


def test_tensorfile_foreign_file_raises(path: Path) -> None:
    save_file(TENSORS, path)
    with pytest.raises(ArtifactError, match="not a psannlm file"):
        read_tensors(path)
    save_file(TENSORS, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="not a psannlm file"):
        read_tensors(path)


def test_tensorfile_detects_every_flipped_bit(path: Path) -> None:
    write_tensors(path, TENSORS, {"format": "test"})
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        with pytest.raises(ArtifactError):
            read_tensors(path)


def test_tensorfile_detects_every_truncation(path: Path) -> None:
    write_tensors(path, TENSORS, {"format": "test"})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError, match=r"cut short|damaged|no safetensors"):
            read_tensors(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ArtifactError, match="is damaged: 1 bytes too long"):
        read_tensors(path)


def forge(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A file with any header and a hash that fits it, so that the checks behind the hash are reached."""
    content = struct.pack("<Q", len(header) if length is None else length) + header + data
    return content.replace(b"@" * 64, hashlib.sha256(content.replace(b"@" * 64, b"0" * 64)).hexdigest().encode())


def header_of(entries: dict[str, Any]) -> bytes:
    return json.dumps({"__metadata__": {"sha256": "@" * 64}, **entries}, separators=(",", ":")).encode()


def refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    tracemalloc.start()
    began = time.monotonic()
    try:
        with pytest.raises(ArtifactError) as caught:
            read_tensors(path)
        assert time.monotonic() - began < 3
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


def entry(start: Any = 0, end: Any = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_tensorfile_untampered_forgery_loads(path: Path) -> None:
    path.write_bytes(forge(header_of({"x": entry()}), bytes(8)))
    assert read_tensors(path).tensors["x"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "entries",
    [
        {"x": entry(0, 8), "y": entry(4, 12), "z": entry(12, 16, (1,))},  # overlapping
        {"x": entry(0, 8), "y": entry(0, 8), "z": entry(8, 16)},  # the same bytes twice
        {"x": entry(8, 16)},  # a hole before
        {"x": entry(0, 8, (10**9,)), "y": entry(8, 16)},
        {"x": entry(0, 16, (2**62, 2**62))},
        {"x": entry(0, 16, (-1, -4))},
        {"x": entry(0, 16, ("2", 2))},
        {"x": entry(0, 16, None)},
        {"x": entry(16, 0)},
        {"x": entry(-16, 16, (4,))},
        {"x": entry(0, 10**18, (10**18,))},
        {"x": entry(0, 2**64 - 1)},
        {"x": entry(0, 2**64 + 16, (4,))},
        {"x": entry(0, 10**4000)},
        {"x": entry(0, 1e400)},
        {"x": entry(0, 16.0, (4,))},
        {"x": entry(0, "16", (4,))},
        {"x": entry(0, True, (4,))},
        {"x": entry(0, None, (4,))},
        {"x": entry(0, 16, (4,), "F33")},
        {"x": entry(0, 16, (4,), None)},
        {"x": entry(0, 16, (32,), "F4")},
        {"x": entry(0, 16, (16,), "F8_E8M0")},
        {"x": entry(0, 16, (2,), "C64")},
        {"x": {"dtype": "F32", "shape": [4]}},
        {"x": {"data_offsets": [0, 16]}},
        {"x": {"data_offsets": []}},
        {"x": {"data_offsets": 16}},
        {"x": None},
        {"x": []},
        {"x": 3},
        {"x": "data_offsets"},
    ],
    ids=lambda entries: str(entries)[:50],
)
def test_tensorfile_false_entries_raise(path: Path, entries: dict[str, Any]) -> None:
    path.write_bytes(forge(header_of(entries), bytes(16)))
    try:
        found = read_tensors(path).tensors
    except ArtifactError:
        refused(path, path.read_bytes())
    else:  # a kind of number that this torch knows
        assert entries["x"]["dtype"] in ("F4", "F8_E8M0", "C64")
        assert found["x"].numel() * found["x"].element_size() == 16


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"__metadata__":null}',
        b'{"__metadata__":{"sha256":7}}',
        b'{"__metadata__":{"sha256":""}}',
        b'{"__metadata__":{"sha256":"' + b"@" * 64,
        b'{"__metadata__":{"sha256":"' + b"@" * 64 + b'","sha256":"' + b"@" * 64 + b'"}}',
        b'{"__metadata__":{"sha256":"' + b"@" * 64 + b'"},"__metadata__":{}}',
        b'{"__metadata__":{"sha256":"' + b"@" * 64 + b'","a":{"b":1}}}',
        b'{"__metadata__":{"sha256" : "' + b"@" * 64 + b'"}}',
        b'{"__metadata__":{"sha256":"' + b"@" * 64 + b'","n":"' + b"x" * 10_000_000,
    ],
    ids=lambda header: repr(header[:40]),
)
def test_tensorfile_foreign_headers_raise(path: Path, header: bytes) -> None:
    refused(path, forge(header, b""))


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 65 << 20])
def test_tensorfile_false_header_lengths_raise(path: Path, length: int) -> None:
    refused(path, forge(header_of({"x": entry()}), bytes(8), length))


def test_tensorfile_huge_header_is_not_read(path: Path) -> None:
    """A sparse file takes no space on disk and could take any amount of memory."""
    path.touch()
    os.truncate(path, 300 << 20)
    with open(path, "r+b") as file:
        file.write(struct.pack("<Q", 200 << 20))
    tracemalloc.start()
    with pytest.raises(ArtifactError, match=r"header of 209,715,200"):
        read_tensors(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_tensorfile_mutations_with_valid_hash_raise_or_load(path: Path) -> None:
    """A mutation that loads has the size of the file: nothing is read or allocated beyond it."""
    rng = random.Random(7)
    original = header_of({"x": entry(0, 8), "y": entry(8, 24, (2, 2)), "zz": entry(24, 32, (1,), "I64")})
    tokens = [
        b"0",
        b"9",
        b"-",
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"e9",
        b"1e999",
        b"NaN",
        b"\\",
        b"\xff",
        b"F64",
    ]
    n_refused = 0
    for _ in range(600):
        header = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(header))
            header[at : at + rng.randint(0, 6)] = rng.choice(tokens) * rng.randint(1, 3)
        path.write_bytes(forge(bytes(header), bytes(32)))
        try:
            tensors, message = read_tensors(path).tensors, ""
        except ArtifactError as error:
            tensors, message = {}, str(error)
        n_refused += bool(message)
        assert "\n" not in message
        assert sum(t.numel() * t.element_size() for t in tensors.values()) <= 32
    assert n_refused > 300


def test_same_shapes_reports_the_difference() -> None:
    expected = {"a": torch.Size([2, 3]), "b": torch.Size([])}
    right = {"a": torch.zeros(2, 3), "b": torch.zeros(())}
    assert same_shapes(right, expected) is None
    assert same_shapes({"a": right["a"]}, expected) == "b is missing"
    assert same_shapes({**right, "a": torch.zeros(3, 2)}, expected) == "a is (3, 2), not (2, 3)"
    assert same_shapes({**right, "z": torch.zeros(1), "c": torch.zeros(1)}, expected) == "c is not part of the model"

"""Hashing a model file before the result is needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from psannlm.io import self_hash
from psannlm.io.safetensors_header import build_header
from psannlm.io.self_hash import BLANK, HASH_KEY, hash_ahead, hash_position, hash_with_blank


def write_file(path: Path, content: bytes) -> int:
    header = build_header({"x": ("U8", (len(content),))}, {HASH_KEY: BLANK})
    path.write_bytes(header + content)
    return hash_position(path, header)


def test_hash_ahead_equals_hash_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    at = write_file(path, os.urandom(self_hash._CHUNK_BYTES + 5))
    expected = hash_with_blank(path, at)
    monkeypatch.chdir(tmp_path)
    hash_ahead(Path(path.name))
    self_hash._ahead[str(path)].thread.join()
    monkeypatch.setattr(self_hash, "_hash_file", lambda descriptor, at: pytest.fail("it is hashed twice"))
    assert hash_with_blank(path, at) == expected


def test_file_changed_after_hash_ahead_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_file(path, b"before")
    hash_ahead(path)
    self_hash._ahead[str(path)].thread.join()
    at = write_file(path, b"behind")
    changed = hash_with_blank(path, at)
    assert changed == hash_with_blank(path, at)


@pytest.mark.parametrize("content", [b"", b"no header", b"\x10" + bytes(40)])
def test_hash_ahead_leaves_errors_to_the_check(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    hash_ahead(path)
    hash_ahead(tmp_path / "absent")
    digest = hash_with_blank(path, 0)
    assert digest == hash_with_blank(path, 0)

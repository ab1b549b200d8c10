"""Manifests: round trip, content hash, and errors for invalid content."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psannlm.config.files import MANIFEST_FILE, prepared_manifest
from psannlm.data.manifest import (
    Manifest,
    ManifestSettings,
    SourceEntry,
    SplitEntry,
    TokenizerEntry,
    _digest,
    read_manifest,
    write_manifest,
)
from psannlm.data.shard_file import ShardEntry
from psannlm.errors import ArtifactError

SHARDS = tuple(ShardEntry(f"train_0000{i}.safetensors", 10, 2, 30, 900, f"{i}" * 64) for i in range(2))
MANIFEST = Manifest(
    tokenizer=TokenizerEntry("tokenizer.model", "sentencepiece", 4096, "ab" * 32, 1, 2, 0),
    dtype="uint16",
    settings=ManifestSettings(0.1, 1337, None, 5, True, "text", False, "strict", 1 << 20),
    part="1/1",
    sources=(SourceEntry("a.txt", 60, "cd" * 32, 4), SourceEntry("ü.jsonl", 1, "", 0)),
    train=SplitEntry.of(SHARDS),
    validation=SplitEntry.of(()),
    drops={"blank document": 3},
    duplicates=1,
    val_overlap=0.25,
)


def test_manifest_roundtrip(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == read_manifest(path) == MANIFEST
    first = path.read_bytes()
    write_manifest(tmp_path, MANIFEST)
    assert path.read_bytes() == first
    assert json.loads(first)["content_sha256"] == MANIFEST.content_sha256


def test_manifest_of_earlier_version_is_read(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, dataclasses.replace(MANIFEST, lost_fraction=0.25))
    fields = json.loads(path.read_bytes())
    assert fields.pop("lost_fraction") == 0.25
    del fields["manifest_sha256"]
    fields["manifest_sha256"] = _digest(fields)
    path.write_text(json.dumps(fields))
    assert read_manifest(tmp_path) == MANIFEST
    assert MANIFEST.lost_fraction is None


@pytest.mark.parametrize("fraction", [-0.5, 1.5])
def test_manifest_lost_fraction_outside_zero_to_one_raises(tmp_path: Path, fraction: float) -> None:
    write_manifest(tmp_path, dataclasses.replace(MANIFEST, lost_fraction=fraction))
    with pytest.raises(ArtifactError, match="lost_fraction is"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("part", ["1/200000000", "0/3", "4/3", "1", "1/2/3", "a/b", "1/" + "9" * 5000, "-1/2", "1/٣"])
def test_manifest_invalid_part_raises(tmp_path: Path, part: str) -> None:
    write_manifest(tmp_path, dataclasses.replace(MANIFEST, part=part))
    with pytest.raises(ArtifactError, match=r"part is .*not i/n with i from 1 to n"):
        read_manifest(tmp_path)


def test_prepared_manifest_ignores_other_manifests(tmp_path: Path) -> None:
    assert prepared_manifest(tmp_path) is None
    path = write_manifest(tmp_path, MANIFEST)
    (tmp_path / "other.json").write_bytes(path.read_bytes())
    assert prepared_manifest(tmp_path) == prepared_manifest(str(path)) == path
    assert prepared_manifest(tmp_path / "other.json") is None
    assert prepared_manifest(tmp_path / "nowhere") is None
    path.write_text('{"name": "a web page"}', encoding="utf-8")
    assert prepared_manifest(tmp_path) is None
    (tmp_path / "train_00000.safetensors").touch()
    assert prepared_manifest(tmp_path) == path, "beside shards it is ours, and damaged"


def test_manifest_content_hash_covers_only_tokens() -> None:
    """Where the text lay and what was left out is no part of it; tokens, their order and the tokenizer are."""
    renamed = dataclasses.replace(MANIFEST.tokenizer, file="x.model")
    same = dataclasses.replace(MANIFEST, tokenizer=renamed, sources=(), drops={}, duplicates=7, part="2/3")
    assert same.content_sha256 == MANIFEST.content_sha256
    others = [
        dataclasses.replace(MANIFEST, train=SplitEntry.of(SHARDS[::-1])),
        dataclasses.replace(MANIFEST, train=SplitEntry.of(SHARDS[:1]), validation=SplitEntry.of(SHARDS[1:])),
        dataclasses.replace(MANIFEST, tokenizer=dataclasses.replace(MANIFEST.tokenizer, fingerprint="0" * 64)),
        dataclasses.replace(MANIFEST, tokenizer=dataclasses.replace(MANIFEST.tokenizer, eos_id=7)),
        dataclasses.replace(MANIFEST, dtype="uint32"),
    ]
    assert len({m.content_sha256 for m in (MANIFEST, *others)}) == 6


def change(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    *outer, last = key.split(".")

    def apply(fields: Any) -> None:
        for name in outer:
            fields = fields[int(name) if name.isdigit() else name]
        if value is KeyError:
            del fields[last]
        else:
            fields[last] = value

    return apply


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("format", "psannlm-shards-9", "psannlm-shards-9"),
        ("dtype", KeyError, "lacks dtype"),
        ("tokenizer.bos_id", KeyError, "lacks tokenizer.bos_id"),
        ("train.shards.1.file_bytes", KeyError, r"lacks train\.shards\[1\]\.file_bytes"),
        ("train.shards.1.extra", 1, r"unknown key 'train\.shards\[1\]\.extra'"),
        ("duplicates", True, "duplicates is True, not a whole number"),
        ("duplicates", -1, "duplicates is -1, not a whole number"),
        ("settings.dedupe", 1, "settings.dedupe is 1, not true or false"),
        ("sources", {}, "sources is {}, not a list"),
        ("drops", [], "drops is .*, not a table"),
        ("drops.x", "y", "drops.x is 'y'"),
        ("train", None, "train is None, not a table"),
        ("dtype", "int8", "dtype is 'int8', not one of uint16, uint32"),
        ("train.shards.0.file", "../x", r"train\.shards\[0\]\.file is '\.\./x', which is not the name of a file"),
        ("train.shards.0.file", "/etc/passwd", "not the name of a file"),
        ("tokenizer.file", "..", "tokenizer.file is"),
        ("train.shards.0.file", "tokenizer.model", "named twice"),
        ("train.tokens", 21, "train is not the sum of its shards"),
        ("sources.0.path", "b.txt", "changed by hand"),
        ("content_sha256", "0" * 64, "changed by hand"),
        ("manifest_sha256", KeyError, "changed by hand"),
    ],
)
def test_manifest_error_names_key_and_value(tmp_path: Path, key: str, value: Any, said: str) -> None:
    path = write_manifest(tmp_path, MANIFEST)
    fields = json.loads(path.read_bytes())
    change(key, value)(fields)
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(ArtifactError, match=said) as caught:
        read_manifest(tmp_path)
    assert MANIFEST_FILE in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b"\xff\xfe", b'{"format": NaN}', b"null"])
def test_manifest_of_other_content_raises(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match=MANIFEST_FILE):
        read_manifest(tmp_path)


def test_manifest_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere"):
        read_manifest(tmp_path / "nowhere")

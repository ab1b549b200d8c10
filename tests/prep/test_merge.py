"""Merged parts equal one preparation of the whole corpus; mismatched parts raise."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from psannlm.data.manifest import read_manifest
from psannlm.data.shard_file import BLOCK_BYTES, open_shard
from psannlm.errors import ArtifactError, ConfigError, CorpusError
from psannlm.prep import merge
from psannlm.prep.merge import merge_parts
from psannlm.prep.pipeline import PrepResult
from psannlm.prep.reader import SourceFile, deal

Prepare = Callable[..., PrepResult]
DocumentsIn = Callable[..., list[tuple[str, int, int]]]
SETTINGS = {"val_split": 0.15, "shard_tokens": 2_000, "per_line": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of several sizes, with many lines that stand in more than one of them."""
    folder = tmp_path_factory.mktemp("files")
    source = random.Random(3)
    for number in range(7):
        lines = [f"the value of object {source.randrange(900)} is an object" for _ in range(60 * (number + 1))]
        (folder / f"{number}.txt").write_text("\n".join([*lines, "", f"only in {number}"]))
    return folder


@pytest.mark.slow
def test_merged_parts_equal_the_whole_preparation(
    prepare: Prepare, files: Path, tmp_path: Path, documents_in: DocumentsIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "_DOCUMENTS_AT_ONCE", 17)
    monkeypatch.setattr(merge, "_TOKENS_AT_ONCE", 40)
    whole = prepare(files, name="whole", **SETTINGS).manifest
    for index in (1, 2, 3):
        prepare(files, name=str(index), part=(index, 3), **SETTINGS)
    merged = merge_parts([tmp_path / name for name in ("2", "3", "1")], tmp_path / "merged").manifest
    for side in ("train", "validation"):
        one, other = (sorted(text for text, *_ in documents_in(tmp_path / n, side)) for n in ("whole", "merged"))
        assert one == other
        assert getattr(merged, side).tokens == getattr(whole, side).tokens
    assert (merged.part, merged.drops, merged.duplicates) == (whole.part, whole.drops, whole.duplicates)
    assert [(s.path, s.bytes, s.sha256) for s in merged.sources] == [(s.path, s.bytes, s.sha256) for s in whole.sources]
    assert sum(source.documents for source in merged.sources) == merged.train.documents + merged.validation.documents
    assert not (tmp_path / "merged" / ".work").exists()
    for text, _, origin in documents_in(tmp_path / "merged"):
        path, record = merged.sources[origin >> 40].path, origin & (1 << 40) - 1
        assert Path(path).read_text().split("\n")[record - 1] == text, "an origin names the file in the merged list"


@pytest.mark.slow
def test_shard_behind_relative_link_is_linked_itself(prepare: Prepare, tmp_path: Path) -> None:
    for name, text in (("a", "one\ntwo"), ("b", "three\nfour")):
        (tmp_path / f"{name}.txt").write_text(text)
    for index in (1, 2):
        prepare(tmp_path / "?.txt", name=f"part{index}", part=(index, 2), per_line=True, val_split=0)
    (tmp_path / "disk").mkdir()
    original = (tmp_path / "part1" / "train_00000.safetensors").rename(tmp_path / "disk" / "moved.safetensors")
    (tmp_path / "part1" / "train_00000.safetensors").symlink_to("../disk/moved.safetensors")
    merged = tmp_path / "deeper" / "merged"
    merge_parts([tmp_path / "part1", tmp_path / "part2"], merged)
    assert not (merged / "train_00000.safetensors").is_symlink()
    assert os.path.samefile(merged / "train_00000.safetensors", original)


@pytest.mark.slow
def test_merge_links_shards_it_keeps_whole(prepare: Prepare, tmp_path: Path, files: Path) -> None:
    for name, text in (("a", "one\ntwo"), ("b", "three\nfour")):
        (tmp_path / f"{name}.txt").write_text(text)
    for index in (1, 2):
        prepare(tmp_path / "?.txt", name=f"part{index}", part=(index, 2), per_line=True, val_split=0)
    merged = tmp_path / "merged"
    manifest = merge_parts([tmp_path / "part1", tmp_path / "part2"], merged).manifest
    for number, entry in enumerate(manifest.train.shards):
        original = tmp_path / f"part{number + 1}" / "train_00000.safetensors"
        assert os.path.samefile(merged / entry.file, original)
        open_shard(merged / entry.file, entry, manifest.tokenizer.fingerprint).verify()


@pytest.mark.slow
def test_merge_copies_shards_without_hard_links(
    prepare: Prepare, tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    prepare(files, name="one", part=(1, 1), **SETTINGS)
    manifest = merge_parts([tmp_path / "one"], tmp_path / "merged").manifest
    assert manifest == read_manifest(tmp_path / "merged")
    entry = manifest.train.shards[0]
    assert (tmp_path / "merged" / entry.file).read_bytes() == (tmp_path / "one" / entry.file).read_bytes()


@pytest.mark.slow
def test_merge_decides_the_split_over_all_documents(
    prepare: Prepare, tmp_path: Path, documents_in: DocumentsIn
) -> None:
    """No part draws a document to hold out, and none may pick one by itself: the merge does, as a whole run does."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"first of {name}\nsecond of {name}")
    settings = {"per_line": True, "val_split": 0.0001}
    prepare(tmp_path / "?.txt", name="whole", **settings)
    for index in (1, 2):
        result = prepare(tmp_path / "?.txt", name=f"part{index}", part=(index, 2), **settings)
        assert result.manifest.validation.documents == 0
    merge_parts([tmp_path / "part1", tmp_path / "part2"], tmp_path / "merged")
    for side in ("train", "validation"):
        one, other = ({text for text, *_ in documents_in(tmp_path / n, side)} for n in ("whole", "merged"))
        assert one == other
        assert one


@pytest.mark.slow
def test_merge_refuses_an_incomplete_set_of_parts(prepare: Prepare, files: Path, tmp_path: Path) -> None:
    for name, index, extra in (("1", 1, {}), ("2", 2, {}), ("other", 2, {"seed": 8}), ("whole", None, {})):
        prepare(files, name=name, part=None if index is None else (index, 2), **{**SETTINGS, **extra})
    out = tmp_path / "merged"
    for names, said in (
        (["1"], "of 2 parts these are missing: 2"),
        (["1", "1"], "are both part 1/2"),
        (["1", "other"], r"seed: 1337 and 8"),
        (["1", "whole"], "part: 1/2 and 1/1"),
    ):
        with pytest.raises(ConfigError, match=said):
            merge_parts([tmp_path / name for name in names], out)
    with pytest.raises(ArtifactError, match="manifest"):
        merge_parts([tmp_path / "1", files], out)
    shard = tmp_path / "2" / "train_00000.safetensors"
    shard.unlink()
    with pytest.raises(ArtifactError, match=r"train_00000\.safetensors is missing"):
        merge_parts([tmp_path / "1", tmp_path / "2"], out)
    assert not out.exists(), "nothing is left behind"
    with pytest.raises(ConfigError, match="is prepared already"):
        merge_parts([tmp_path / "1", tmp_path / "2"], tmp_path / "1")


@pytest.mark.slow
def test_merge_refuses_a_damaged_part(prepare: Prepare, tmp_path: Path) -> None:
    """Also where merging needs nothing of the block that is damaged, and only gives its shard another name."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"{name}{number}" for number in range(40_000)))
    for index in (1, 2):
        prepare(tmp_path / "?.txt", name=str(index), part=(index, 2))
    path = tmp_path / "2" / "train_00000.safetensors"
    content = bytearray(path.read_bytes())
    assert len(content) > 3 * BLOCK_BYTES
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"train_00000\.safetensors is damaged"):
        merge_parts([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    assert not (tmp_path / "merged" / "manifest.json").exists()


@pytest.mark.slow
def test_merge_refuses_single_document_in_all_parts(prepare: Prepare, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("the same text")
    for index in (1, 2):
        prepare(tmp_path / "?.txt", name=str(index), part=(index, 2))
    with pytest.raises(CorpusError, match="a single document"):
        merge_parts([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")


def test_files_are_dealt_evenly_and_all_of_them(prepare: Prepare, tmp_path: Path) -> None:
    source = random.Random(1)
    files = [SourceFile(str(number), source.randrange(1, 1_000)) for number in range(50)]
    parts = deal(files, 4)
    assert sorted(index for part in parts for index in part) == list(range(50))
    assert all(part == sorted(part) for part in parts)
    sizes = [sum(files[index].n_bytes or 0 for index in part) for part in parts]
    assert max(sizes) - min(sizes) < 100
    with pytest.raises(ConfigError, match="5 parts are more than the 4 files"):
        deal(files[:4], 5)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}))
    for part in ((0, 2), (3, 2)):
        with pytest.raises(ConfigError, match="does not exist"):
            prepare(tmp_path / "a.jsonl", part=part)

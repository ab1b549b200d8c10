"""Copies of prepared folders at URLs: equal bytes, checked by hash, made once, and renewed where they are damaged."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from psannlm.config.data import DataConfig, PathSource
from psannlm.config.files import may_be_prepared
from psannlm.data import remote_prepared
from psannlm.data.manifest import MANIFEST_FILE
from psannlm.data.prepare import load_corpus
from psannlm.data.prepared import PreparedFolder, find_prepared
from psannlm.data.remote_prepared import find_remote_prepared
from psannlm.errors import ArtifactError, CorpusError, StorageError
from psannlm.io.remote_folder import RemoteFolder
from psannlm.runtime.progress import Progress
from psannlm.scaffold.survey import survey_text
from psannlm.tokenizers.char import CharTokenizer

fsspec = pytest.importorskip("fsspec")

URL = "memory://remote/shards"
TEXTS = [f"line {i}: {'waves ' * (i % 7)}" for i in range(23)]
HELD_OUT = ["the first that was held out", "the second"]


@pytest.fixture(scope="module")
def original(prepare_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("prepared"), CharTokenizer("éü"), TEXTS, HELD_OUT)


@pytest.fixture
def memory(original: Path) -> Iterator[Any]:
    """A file system in memory that holds the prepared folder at ``URL``."""
    system = fsspec.filesystem("memory")
    for path in original.iterdir():
        system.pipe_file(f"{URL}/{path.name}", path.read_bytes())
    yield system
    system.rm("memory://remote", recursive=True)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read at URLs, but for the manifest; one entry for each range."""
    seen: list[str] = []
    read = RemoteFolder.read

    def noting(folder: RemoteFolder, name: str, *limits: int) -> bytes | None:
        if name != MANIFEST_FILE:
            seen.append(name)
        return read(folder, name, *limits)

    monkeypatch.setattr(RemoteFolder, "read", noting)
    return seen


def config(cache: Path, url: str = URL, **settings: Any) -> DataConfig:
    return DataConfig(sources=(PathSource(path=url),), cache_dir=str(cache), max_length=16, **settings)


def open_all(cache: Path, on_progress: Callable[[Progress], None] = lambda progress: None) -> PreparedFolder:
    source = find_prepared([PathSource(path=URL)])
    assert source is not None
    return source.open(str(cache), on_progress)


def copy_in(cache: Path) -> Path:
    (folder,) = (cache / "prepared").iterdir()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("url", [URL, f"{URL}/", f"{URL}/manifest.json"])
def test_copy_holds_the_bytes_of_the_folder(
    memory: Any, original: Path, tmp_path: Path, logged: pytest.LogCaptureFixture, url: str
) -> None:
    data = load_corpus(config(tmp_path, url))
    assert contents(copy_in(tmp_path)) == contents(original), "and nothing else, neither locks nor temporary files"
    local = load_corpus(DataConfig(sources=(PathSource(path=str(original)),), max_length=16))
    assert data.report.sha256 == local.report.sha256
    n = local.train.n_framed_tokens
    assert data.train.tokens(0, n).tolist() == local.train.tokens(0, n).tolist()
    assert f"prepared folder: {URL}" in logged.messages


def test_whole_files_are_copied_once(memory: Any, tmp_path: Path, reads: list[str]) -> None:
    open_all(tmp_path)
    assert len(reads) == len(set(reads)) == 7
    open_all(tmp_path)
    assert len(reads) == 7


@pytest.mark.parametrize("what", ["missing", "cut", "swapped", "header"])
def test_only_damaged_files_are_copied_again(
    memory: Any, original: Path, tmp_path: Path, reads: list[str], what: str
) -> None:
    open_all(tmp_path)
    reads.clear()
    path = copy_in(tmp_path) / "train_00002.safetensors"
    content = bytearray(path.read_bytes())
    content[9] ^= 1
    damaged = {
        "missing": None,
        "cut": content[:-1],
        "swapped": path.with_name("train_00001.safetensors").read_bytes(),
        "header": content,
    }[what]
    path.unlink() if damaged is None else path.write_bytes(damaged)
    open_all(tmp_path)
    assert reads == [path.name]
    assert contents(copy_in(tmp_path)) == contents(original)


def test_ranges_of_a_shard_are_joined_in_order(
    memory: Any, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    monkeypatch.setattr(remote_prepared, "_RANGE_BYTES", 100)
    shown: list[Progress] = []
    open_all(tmp_path, shown.append)
    assert contents(copy_in(tmp_path)) == contents(original)
    total = sum(path.stat().st_size for path in original.glob("*.safetensors"))
    assert [shown[-1].done, shown[-1].total] == [total, total]
    assert len(shown) == sum(-(-path.stat().st_size // 100) for path in original.glob("*.safetensors"))


def test_any_flipped_bit_of_a_shard_is_refused(memory: Any, original: Path, tmp_path: Path) -> None:
    """On the way or at the URL; a shard that does not match never gets its name."""
    chance = random.Random(3)
    name = "train_00001.safetensors"
    content = (original / name).read_bytes()
    for _ in range(30):
        flipped = bytearray(content)
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        memory.pipe_file(f"{URL}/{name}", bytes(flipped))
        with pytest.raises(ArtifactError, match=rf"{re.escape(URL)}/{name} is not the shard"):
            open_all(tmp_path)
        assert not (copy_in(tmp_path) / name).exists()
        assert not (copy_in(tmp_path) / MANIFEST_FILE).exists()
    memory.pipe_file(f"{URL}/{name}", content)
    open_all(tmp_path)
    assert contents(copy_in(tmp_path)) == contents(original)


@pytest.mark.parametrize("name", ["train_00001.safetensors", "tokenizer.json"])
def test_files_missing_at_the_url_are_named(memory: Any, tmp_path: Path, name: str) -> None:
    memory.rm_file(f"{URL}/{name}")
    with pytest.raises(ArtifactError, match=rf"{re.escape(URL)}/{name} is missing"):
        open_all(tmp_path)


def test_folder_that_changes_during_a_copy_is_refused(
    memory: Any, prepare_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The manifest was read before, the shards are those of another preparation."""
    source = find_remote_prepared(URL)
    assert source is not None
    (tmp_path / "other").mkdir()
    other = prepare_folder(tmp_path / "other", CharTokenizer("éü"), TEXTS[::-1], HELD_OUT)
    for path in other.iterdir():
        memory.pipe_file(f"{URL}/{path.name}", path.read_bytes())
    with pytest.raises(ArtifactError, match=rf"{re.escape(URL)} changed while it was copied.*[Rr]un the command again"):
        remote_prepared.copy_files(source, ("train",), tmp_path / "cache", lambda progress: None)
    assert load_corpus(config(tmp_path / "cache")).report.sha256 != source.manifest.content_sha256


def test_two_preparations_at_one_url_have_two_copies(
    memory: Any, prepare_folder: Callable[..., Path], tmp_path: Path, original: Path
) -> None:
    """A run that reads the former copy keeps it."""
    first = open_all(tmp_path / "cache")
    (tmp_path / "other").mkdir()
    for path in prepare_folder(tmp_path / "other", CharTokenizer("éü"), TEXTS[::-1], HELD_OUT).iterdir():
        memory.pipe_file(f"{URL}/{path.name}", path.read_bytes())
    second = open_all(tmp_path / "cache")
    assert first.manifest.content_sha256 != second.manifest.content_sha256
    assert len(list((tmp_path / "cache" / "prepared").iterdir())) == 2
    for folder in (first, second):
        for shard in folder.train.segments:
            shard.verify()


def test_disk_is_checked_before_anything_is_copied(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    monkeypatch.setattr(remote_prepared, "free_bytes", lambda path: 100)
    with pytest.raises(StorageError, match=r"needs .* MB more .*data\.cache_dir or \$PSANNLM_CACHE_DIR"):
        open_all(tmp_path)
    assert not reads


def test_evaluation_copies_the_validation_split_alone(memory: Any, tmp_path: Path, reads: list[str]) -> None:
    source = find_prepared([PathSource(path=URL)])
    assert source is not None
    folder = source.open_held_out(str(tmp_path))
    assert folder.held_out.n_documents == len(HELD_OUT)
    assert sorted(reads) == ["tokenizer.json", "validation_00000.safetensors"]
    assert not (copy_in(tmp_path) / MANIFEST_FILE).exists(), "which would say that all shards are there"
    reads.clear()
    open_all(tmp_path)
    assert all(name.startswith("train_") for name in reads)


def test_survey_of_a_url_copies_nothing(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSANNLM_CACHE_DIR", str(tmp_path))
    survey = survey_text([PathSource(path=URL)])
    assert (survey.n_documents, survey.manifest is not None) == (len(TEXTS) + len(HELD_OUT), True)
    assert not list(tmp_path.iterdir())


def test_damaged_block_of_a_copy_names_its_url(memory: Any, tmp_path: Path) -> None:
    path = copy_of_train(open_all(tmp_path), tmp_path)
    content = bytearray(path.read_bytes())
    content[2500] ^= 1  # behind the header, which is checked when the copy is opened
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{path.name} is damaged .* copied again from {re.escape(URL)}"):
        open_all(tmp_path).train.segments[0].verify()


def copy_of_train(folder: PreparedFolder, cache: Path) -> Path:
    return copy_in(cache) / folder.manifest.train.shards[0].file


def test_unfinished_work_at_a_url_is_named(memory: Any, tmp_path: Path) -> None:
    memory.rm_file(f"{URL}/{MANIFEST_FILE}")
    memory.pipe_file(f"{URL}/.work/plan.json", b"{}")
    with pytest.raises(ArtifactError, match=rf"{re.escape(URL)} holds unfinished work of psannlm prep"):
        load_corpus(config(tmp_path))


def test_text_at_a_url_is_read_as_text(memory: Any, tmp_path: Path) -> None:
    memory.pipe_file("memory://remote/text/a.txt", b"some text\nand more")
    memory.pipe_file("memory://remote/text/manifest.json", b'{"name": "another tool"}')
    source = PathSource(path="memory://remote/text", per_line=True)
    assert load_corpus(DataConfig(sources=(source,), tokenizer="simple", max_length=4)).train.n_documents == 2
    assert not list(tmp_path.iterdir())


def test_shards_at_a_url_are_no_text(memory: Any) -> None:
    """Where text is asked for, the tables beside shards must not become part of it."""
    memory.pipe_file(f"{URL}/table.txt", b"figures")
    with pytest.raises(CorpusError, match="no text there"):
        load_corpus(DataConfig(sources=(PathSource(path="memory://remote"),), max_length=4))


@pytest.mark.parametrize(
    ("path", "may_be"),
    [
        ("s3://bucket/shards", True),
        ("s3://bucket", True),
        ("https://host/shards/manifest.json", True),
        ("https://host/shards", False),
        ("s3://bucket/a.jsonl.gz", False),
        ("s3://bucket/*", False),
        ("ftp://host/shards", False),
        ("shards", False),
        ("file:///tmp", False),
    ],
)
def test_only_urls_that_may_be_folders_are_looked_at(path: str, may_be: bool) -> None:
    assert may_be_prepared(path) == may_be

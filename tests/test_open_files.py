"""Shards, parts, files and runs may be more than the limit of open files."""

from __future__ import annotations

import errno
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from psannlm.commands.app import main
from psannlm.config.data import PathSource
from psannlm.data.corpus.documents import ReadReport, read_documents
from psannlm.data.mapping import map_bytes
from psannlm.data.prepared import open_folder
from psannlm.errors import CorpusError, describe
from psannlm.io.records import write_record
from psannlm.prep.dedup import DuplicateFinder
from psannlm.prep.merge import merge_parts
from psannlm.prep.pipeline import PrepSettings, prepare_corpus
from psannlm.reports.gather import gather
from psannlm.tokenizers.char import CharTokenizer

resource = pytest.importorskip("resource", reason="a limit of open files is a thing of POSIX systems")
N_LINES = 90


@pytest.fixture
def few_files() -> Iterator[None]:
    """Let this process open two dozen files more than it has open, and no more."""
    gc.collect()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 24, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """As many files as lines, each with one line."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(N_LINES):
        (folder / f"{number:03d}.txt").write_text(f"line number {number} of them all\n", encoding="utf-8")
    CharTokenizer.fit(["line number of them all"], 300).save(tmp_path / "t.json")
    return folder


@pytest.mark.slow
def test_more_shards_than_open_files_are_merged_and_read(corpus: Path, few_files: None, tmp_path: Path) -> None:
    # A document has more than 16 tokens, so each has a shard of its own.
    settings = PrepSettings(shard_tokens=16, val_split=0.1)
    parts = [tmp_path / "part1", tmp_path / "part2"]
    for number, part in enumerate(parts, start=1):
        prepare_corpus([str(corpus)], tmp_path / "t.json", part, settings, n_workers=1, part=(number, 2))
    merged = merge_parts(parts, tmp_path / "merged").folder
    before = len(os.listdir("/dev/fd"))
    folder = open_folder(merged / "manifest.json")
    assert folder.validation is not None
    assert len(os.listdir("/dev/fd")) == before
    texts = set()
    for store in (folder.train, folder.validation):
        assert len(store.segments) == store.n_documents
        for segment in store.segments:
            ids = segment.tokens(0, segment.n_framed_tokens)
            texts.add(folder.tokenizer.decode(ids[1:-1].tolist()))
    assert texts == {f"line number {number} of them all\n" for number in range(N_LINES)}


def test_more_sources_than_open_files_are_read(corpus: Path, few_files: None) -> None:
    report = ReadReport()
    documents = list(read_documents([PathSource(path=str(corpus))], report))
    assert (len(documents), report.files) == (N_LINES, N_LINES)


def test_more_buckets_than_open_files_find_duplicates(few_files: None, tmp_path: Path) -> None:
    hashes = np.random.default_rng(0).integers(0, 256, (600, 16), dtype=np.uint8)
    hashes[500:] = hashes[:100]
    with DuplicateFinder(tmp_path, len(hashes), bucket_bytes=24) as finder:
        for first in (0, 300):
            finder.add(np.arange(first, first + 300, dtype=np.int64), hashes[first : first + 300])
        assert np.flatnonzero(finder.repeated().among(0, 600)).tolist() == list(range(500, 600))
    assert not any(tmp_path.iterdir())


def test_more_records_than_open_files_are_gathered(few_files: None, tmp_path: Path) -> None:
    write_record(tmp_path / "00.json.record", "tokenize", {"file": "t.json"}, "a table\n")
    for number in range(1, 60):
        shutil.copytree(tmp_path / "00.json.record", tmp_path / f"{number:02d}.json.record")
    found = gather(tmp_path / "none", [], records=[tmp_path])
    assert (len(found.artifacts), found.unread) == (60, [])


def test_memory_map_is_read_only_and_released(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(256)) * 100)
    with open(path, "rb") as file:
        whole = map_bytes(file, 25_600)
        with pytest.raises(OSError, match="shorter"):
            map_bytes(file, 25_601)
    view = whole[256:512]
    del whole
    assert view.tobytes() == bytes(range(256))
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        view.flags.writeable = True
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(path) in maps.read_text(encoding="utf-8")
        del view
        gc.collect()
        assert str(path) not in maps.read_text(encoding="utf-8")


def test_too_many_open_files_error_has_remedy(tmp_path: Path, few_files: None) -> None:
    hogs = []
    with pytest.raises(CorpusError) as caught:  # noqa: PT012
        while True:
            hogs.append(os.open(os.devnull, os.O_RDONLY))
            if len(hogs) > 2000:
                break
            try:
                os.close(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                list(read_documents([PathSource(path=__file__)]))
    for hog in hogs:
        os.close(hog)
    assert "ulimit -n" in describe(caught.value)
    assert "ulimit -n" in describe(OSError(errno.EMFILE, "Too many open files"))
    assert "ulimit" not in describe(OSError(errno.ENOENT, "No such file"))


def test_commands_raise_soft_limit_of_open_files(few_files: None) -> None:
    low, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == max(low, min(1 << 16, hard))

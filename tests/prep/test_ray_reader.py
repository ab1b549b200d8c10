"""Reading of a corpus on the nodes of a cluster: chunks are those that one process makes, whatever the kind of file."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from psannlm.data.split import SEGMENT_BYTES
from psannlm.errors import ConfigError, CorpusError
from psannlm.prep.chunks import Chunk, Section, gather
from psannlm.prep.engine import Engine
from psannlm.prep.job import PrepSettings
from psannlm.prep.ray_reader import locate
from psannlm.prep.ray_worker import differing_file, find_blocks, plain_files, with_bytes_of_files
from psannlm.prep.reader import CorpusReader, Cut, Drops, SourceFile, find_sources

_LONG = ("sine waves of a long text, naïve and Ærøskøbing\r\n" * 12_000).encode()
assert len(_LONG) > 2 * SEGMENT_BYTES
_LINES = b"".join(json.dumps({"text": f"line {n} " * (n % 50)}).encode() + b"\n" for n in range(3_000))
_MARK = b"\xef\xbb\xbf"

# name: content, settings, bytes that are sent instead of being read again from the file
KINDS: dict[str, tuple[bytes, dict[str, Any], int]] = {
    "lines.jsonl": (_LINES, {}, 0),
    "no newline at the end.jsonl": (_LINES + b'{"text": "' + b"end " * 30 + b'"}', {}, 0),
    "lines.txt": (_MARK + _LINES, {"per_line": True}, 0),
    "long lines.txt": (_MARK + _LONG.replace(b"\r\n", b"") + b"\r\n" + _LINES, {"per_line": True}, 0),
    "short.txt": (_MARK + b"a short text of a file" * 20, {}, 0),
    "long.txt": (_LONG, {}, 0),
    "long with a mark.txt": (_MARK + _LONG, {}, 0),
    "lines.jsonl.gz": (gzip.compress(_LINES), {}, len(_LINES)),
    "packed.txt": (gzip.compress(_LONG), {}, len(_LONG)),
    "damaged.txt": (_LONG + b"\xff" + _LONG, {"errors": "replace"}, -1),
}


def _chunks(files: dict[int, SourceFile], settings: PrepSettings, cut: Cut | None, names: list[str]) -> Iterator[Chunk]:
    reader = CorpusReader(files, list(files), settings, 20_000, Drops(), cut)

    def sections() -> Iterator[tuple[Section, bytes]]:
        for found, content in find_blocks(reader.sections(), plain_files(files, 64), 20_000, 64):
            at = 0
            for values in found:
                section = Section(*values)
                n_sent = 0 if section.is_in_file else section.n_bytes
                yield section, content[at : at + n_sent]
                at += n_sent
            assert at == len(content)

    return gather(sections(), names, 20_000)


@pytest.mark.parametrize(
    ("name", "is_cut"), [*((name, False) for name in KINDS), ("long.txt", True), ("long with a mark.txt", True)]
)
def test_chunks_read_on_workers_equal_those_of_driver(name: str, is_cut: bool, tmp_path: Path) -> None:
    content, changes, n_sent = KINDS[name]
    settings = PrepSettings(**changes, val_split=0.1)
    # A second file: chunks go from one to the other.
    for path in (tmp_path / name, tmp_path / f"z {name}"):
        path.write_bytes(content)
    sources = find_sources([str(tmp_path)], Drops())
    names = [source.path for source in sources]
    files = dict(enumerate(sources))
    cut = Cut(0, 0, None) if is_cut else None
    local = list(gather(CorpusReader(sources, [0, 1], settings, 20_000, Drops(), cut).sections(), names, 20_000))
    found = list(_chunks(files, settings, cut, names))
    assert len(local) > 1 or name == "short.txt"
    sent = sum(len(chunk.payload) for chunk in found)
    assert sent == 2 * n_sent if n_sent >= 0 else 0 < sent < 4 * len(_LONG)
    for ours, theirs in zip(local, found, strict=True):
        whole = with_bytes_of_files(theirs, files)
        assert bytes(whole.payload) == bytes(ours.payload)
        assert [section[:7] for section in whole.sections] == [section[:7] for section in ours.sections]
        assert (whole.index, whole.names) == (ours.index, ours.names)


def test_small_sections_are_sent_instead_of_requested(tmp_path: Path) -> None:
    """A file of a few bytes would otherwise cost a request of its own."""
    for number in range(5):
        (tmp_path / f"{number}.txt").write_bytes(b"a" * 50)
    files = dict(enumerate(find_sources([str(tmp_path)], Drops())))
    (chunk,) = _chunks(files, PrepSettings(), None, ["0", "1", "2", "3", "4"])
    assert (len(chunk.payload), chunk.is_whole) == (250, True)


def test_ranges_of_urls_are_read() -> None:
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe_file("/ranges/a.jsonl", _LINES)
    (source,) = find_sources(["memory://ranges/a.jsonl"], Drops())
    chunks = list(_chunks({0: source}, PrepSettings(), None, [source.path]))
    assert sum(len(chunk.payload) for chunk in chunks) == 0
    assert b"".join(bytes(with_bytes_of_files(chunk, {0: source}).payload) for chunk in chunks) == _LINES
    fsspec.filesystem("memory").rm("/ranges", recursive=True)


def test_bytes_of_another_file_are_refused(tmp_path: Path) -> None:
    """Also where size and time are equal, as of copies that each node made itself."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(_LINES)
    (source,) = find_sources([str(path)], Drops())
    chunk = next(_chunks({0: source}, PrepSettings(), None, [source.path]))
    other = tmp_path / "b.jsonl"
    other.write_bytes(_LINES.replace(b"line 7 ", b"line 8 "))
    os.utime(other, ns=(path.stat().st_mtime_ns, path.stat().st_mtime_ns))
    with pytest.raises(CorpusError, match=r"b\.jsonl: bytes 0 to [\d,]+ differ"):
        with_bytes_of_files(chunk, {0: SourceFile(str(other), source.n_bytes, source.stamp)})
    path.write_bytes(_LINES + _LINES)
    with pytest.raises(CorpusError, match="changed while the corpus was prepared"):
        with_bytes_of_files(chunk, {0: source})


def test_differing_file_names_what_a_node_sees(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"text")
    (source,) = find_sources([str(path)], Drops())
    assert differing_file([source])[1] == ""
    assert "has 4 bytes there, not 5" in differing_file([SourceFile(source.path, 5, source.stamp)])[1]
    assert "another modification time" in differing_file([SourceFile(source.path, 4, "1")])[1]
    assert "b.txt: cannot be read" in differing_file([source, SourceFile(str(tmp_path / "b.txt"), 4, "1")])[1]


def test_sources_of_one_process_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path in ("-", "memory://corpus/a.txt"):
        with pytest.raises(ConfigError, match=r"--read-on workers: .* exists in this process alone.*--read-on driver"):
            locate([SourceFile(path, None)])
    monkeypatch.chdir(tmp_path)
    assert [each.path for each in locate([SourceFile("a.txt", 1), SourceFile("s3://b/a.txt", 1)])] == [
        str(tmp_path / "a.txt"),
        "s3://b/a.txt",
    ]
    with pytest.raises(ConfigError, match="--read-on workers needs --engine ray"):
        Engine("local", read_on="workers")
    with pytest.raises(ConfigError, match=r"'worker' is not one of driver, workers \(did you mean 'workers'\?\)"):
        Engine("ray", read_on="worker")

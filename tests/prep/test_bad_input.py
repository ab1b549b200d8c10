"""Errors of ``prep`` for invalid corpora and full disks, without partial results."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from psannlm.data.manifest import MANIFEST_FILE
from psannlm.data.split import SEGMENT_BYTES
from psannlm.errors import ArtifactError, ConfigError, CorpusError, PsannlmError, StorageError
from psannlm.prep import pipeline as prep_run
from psannlm.prep.pipeline import PrepResult

Prepare = Callable[..., PrepResult]
FolderBytes = Callable[[Path], dict[str, str]]
DocumentsIn = Callable[..., list[tuple[str, int, int]]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"fine\n\xe4h", r"a\.txt: byte 5 is 0xE4, which is not UTF-8"),
        ("lines.txt", b"fine\n" * 999 + b"\xff\n", r"lines\.txt: byte 4,995 is 0xFF"),
        ("long.txt", b"x" * (SEGMENT_BYTES + 7) + b"\xc3", r"long\.txt: byte 262,151 is 0xC3"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"txt": "b"}\n',
            r"a\.jsonl:2: no key 'text' among 'txt' \(did you mean 'txt'\?\)",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": 7}\n', r"a\.jsonl:2: 'text' must hold a string, not a number"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', r"a\.jsonl:3: not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: lone surrogate U\+D800"),
        ("a.txt.gz", gzip.compress(b"some text" * 999, mtime=0)[:-9], r"a\.txt\.gz: damaged or cut short"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet: not a whole Parquet file"),
        ("a.csv", b"a,b", r"a\.csv: \.csv cannot be read"),
        ("blank.txt", b" \n \n", "no document of the corpus is kept[^@]*blank line x 2"),
        ("empty.txt", b"", "no document of the corpus is kept[^@]*empty file x 1"),
    ],
)
def test_prep_names_a_file_that_is_not_text(
    prepare: Prepare, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=said) as caught:
        prepare(tmp_path / name, per_line="line" in name or "blank" in name, n_workers=2)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out" / MANIFEST_FILE).exists()


def test_prep_names_a_column_that_is_not_text(prepare: Prepare, tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["a", None], "n": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet: row 1: 'n' must hold a string, not a number"):
        prepare(tmp_path / "a.parquet", text_key="n")
    with pytest.raises(CorpusError, match=r"a\.parquet: row 2: 'text' must hold a string, not null"):
        prepare(tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet: no column 'txt' among 'text', 'n' \(did you mean 'text'\?\)"):
        prepare(tmp_path / "a.parquet", text_key="txt")


@pytest.mark.slow
def test_prep_reports_the_first_fault_in_corpus_order(prepare: Prepare, tmp_path: Path) -> None:
    """Whichever worker comes upon one first."""
    for number in range(40):
        (tmp_path / f"{number:02d}.jsonl").write_text('{"text": "fine"}\n' * 40 + ("bad\n" if number > 2 else ""))
    for n_workers in (1, 3, 3):
        with pytest.raises(CorpusError, match=r"03\.jsonl:41: not JSON"):
            prepare(tmp_path / "*.jsonl", n_workers=n_workers, chunk_bytes=600)


@pytest.mark.slow
def test_surrogates_and_bytes_of_tables_are_replaced_and_counted(
    prepare: Prepare, tokenizer_path: Path, tmp_path: Path, documents_in: DocumentsIn, logged: pytest.LogCaptureFixture
) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.ndjson").write_text('{"text": "fine"}\n{"text": "a \\ud83d b\\ude00"}\n')
    column = arrow.array([b"one", b"caf\xe9"], arrow.binary()).view(arrow.string())
    parquet.write_table(arrow.table({"text": column}), tmp_path / "b.parquet")
    settings = prep_run.PrepSettings(errors="replace", val_split=0)
    sources = [str(tmp_path / name) for name in ("a.ndjson", "b.parquet")]
    prep_run.prepare_corpus(sources, tokenizer_path, tmp_path / "out", settings, n_workers=1)
    texts = [text for text, *_ in documents_in(tmp_path / "out")]
    assert texts == ["fine", "a \ufffd b\ufffd", "one", "caf\ufffd"]
    (said,) = (line for line in logged.messages if "U+FFFD" in line)
    assert "replaced 1 bytes that are not UTF-8 and 2 lone surrogates" in said
    assert "a.ndjson:2, " in said
    assert "b.parquet:2" in said
    for source, place in (("a.ndjson", r"a\.ndjson:2: lone"), ("b.parquet", r"b\.parquet: row 2: byte 3")):
        with pytest.raises(CorpusError, match=rf"{place}.*--errors replace"):
            prepare(tmp_path / source, name="strict")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_one_compressed_document_is_cut_by_its_text(
    prepare: Prepare, tmp_path: Path, documents_in: DocumentsIn, name: str
) -> None:
    """Under any name: the stored bytes are not those of the text."""
    text = "".join(f"line {i} of a document\n" for i in range(20_000))
    (tmp_path / name).write_bytes(gzip.compress(text.encode(), 1))
    prepare(tmp_path / name, val_split=0.1, chunk_bytes=100_000)
    (train,), (held_out,) = (documents_in(tmp_path / "out", side) for side in ("train", "validation"))
    assert train[0] + held_out[0] == text
    assert 0.05 < len(held_out[0]) / len(text) < 0.15


@pytest.mark.parametrize("source", ["x.txt", "-"])
def test_prep_non_text_raises_for_files_and_stdin(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    for content, said in (("wave\n".encode("utf-16-le"), "UTF-16LE"), (b"<!doctype html><p>Hello", "an HTML page")):
        (tmp_path / "x.txt").write_bytes(content)
        for errors in ("strict", "replace"):
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
            with pytest.raises(CorpusError, match=f"is {said}"):
                prepare(source if source == "-" else tmp_path / source, errors=errors)


@pytest.mark.slow
def test_prep_errors_replace_counts_bytes(
    tokenizer_path: Path, tmp_path: Path, documents_in: DocumentsIn, logged: pytest.LogCaptureFixture
) -> None:
    contents = {
        "a.txt": b"caf\xe9 and \xef\xbf\xbd of its own",
        "b.jsonl": b'{"text": "fine"}\n{"text": "\xff\xfe"}\n',
        "c.txt": "\u20ac ".encode() * 400_000 + b"\xe2\x82 end \xc3",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    settings = prep_run.PrepSettings(errors="replace", val_split=0)
    sources = [str(tmp_path / name) for name in contents]
    prep_run.prepare_corpus(sources, tokenizer_path, tmp_path / "out", settings, n_workers=2)
    texts = [text for text, *_ in documents_in(tmp_path / "out")]
    assert texts == [
        "caf\ufffd and \ufffd of its own",
        "fine",
        "\ufffd\ufffd",
        contents["c.txt"].decode("utf-8", "replace"),
    ]
    (said,) = (line for line in logged.messages if "U+FFFD" in line)
    assert "replaced 6 bytes" in said
    for name in ("a.txt", "b.jsonl:2", "c.txt"):
        assert str(tmp_path / name) in said


@pytest.mark.slow
def test_prep_names_a_file_that_changes_meanwhile(
    prepare: Prepare, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    files = sorted(folder.glob("*.txt"))
    original = prep_run.gather
    happens: list[Callable[[], object]] = [lambda: files[-1].write_text("quite another text")]

    def gather(*arguments: Any) -> Iterator[Any]:
        for chunk in original(*arguments):
            if chunk.index == 3 and happens:
                happens.pop()()
            yield chunk

    def stop() -> None:
        raise PsannlmError("stopped")

    monkeypatch.setattr(prep_run, "gather", gather)
    with pytest.raises(CorpusError, match=rf"{files[-1].name} changed while the corpus was prepared"):
        prepare(folder)
    # Between two runs, behind the back of size and time: the content tells.
    files[-1].write_bytes(corpus.joinpath(files[-1].name).read_bytes())
    shutil.rmtree(tmp_path / "out")
    happens.append(stop)
    with pytest.raises(PsannlmError, match="stopped"):
        prepare(folder)
    stamp = files[0].stat()
    files[0].write_bytes(files[0].read_bytes()[:-1] + b"!")
    os.utime(files[0], ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(CorpusError, match=rf"{files[0].name}.* changed since the preparation in .* began"):
        prepare(folder)


LIMITED = """
import resource, sys
from pathlib import Path
from psannlm.errors import PsannlmError
from psannlm.prep.pipeline import prepare_corpus
from psannlm.prep.job import PrepSettings
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    prepare_corpus([sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]), PrepSettings(), n_workers=2, chunk_bytes=5000)
except PsannlmError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1_500, 30_000])
def test_prep_resumes_after_full_disk(
    prepare: Prepare, corpus: Path, tokenizer_path: Path, tmp_path: Path, folder_bytes: FolderBytes, limit: int
) -> None:
    """Among the pieces, and among the shards."""
    arguments = [sys.executable, "-c", LIMITED, str(corpus), str(tokenizer_path), str(tmp_path / "out"), str(limit)]
    said = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert said.stderr == ""
    assert said.stdout.startswith("StorageError not enough disk space to write ")
    assert "free" in said.stdout
    assert said.stdout.count("\n") == 1
    assert not (tmp_path / "out" / MANIFEST_FILE).exists()
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert bool(list((tmp_path / "out" / ".work").glob("piece_*"))) == (limit > 2_000)
    prepare(corpus)
    prepare(corpus, name="straight")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "straight")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != limit


@pytest.mark.slow
def test_prep_disk_space_is_checked_early(
    prepare: Prepare, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=40_000))
    with pytest.raises(StorageError, match=r"needs about \d+ MB for encoded chunks and shards, and 0 MB are free"):
        prepare(corpus, n_workers=2)
    assert len(list((tmp_path / "out" / ".work").glob("piece_*"))) < 12


def test_prep_reports_an_output_folder_it_cannot_make(prepare: Prepare, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StorageError, match="a file is in the place of a folder"):
        prepare(corpus)


@pytest.mark.slow
def test_prep_names_damaged_files(prepare: Prepare, corpus: Path, tmp_path: Path) -> None:
    prepare(corpus)
    manifest = tmp_path / "out" / MANIFEST_FILE
    content = manifest.read_text()
    manifest.write_text(content.replace('"uint16"', '"uint32"'))
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        prepare(corpus)
    manifest.unlink()
    with pytest.raises(StorageError, match=r"train_00000\.safetensors is in the way"):
        prepare(corpus)
    (tmp_path / "t.json").write_text(json.dumps({"version": 9}))
    with pytest.raises(PsannlmError, match=r"t\.json"):
        prepare(corpus, tokenizer=tmp_path / "t.json", name="other")


def test_prep_endless_json_line_raises_in_bounded_memory(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psannlm.prep.reader.LONGEST_JSON_LINE_BYTES", 1 << 16)
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "' + "x" * (1 << 18))
    with pytest.raises(CorpusError, match=r"a\.jsonl:2: a line of more than"):
        prepare(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "settings", [{"val_split": 1}, {"min_chars": -1}, {"max_chars": 0}, {"seed": -1}, {"errors": "x"}]
)
def test_settings_out_of_range_are_named(prepare: Prepare, corpus: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        prepare(corpus, **settings)

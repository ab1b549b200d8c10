"""Reading of documents: exact text, counts of omissions, and errors with file and position."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psannlm.config.data import BuiltinSource, PathSource
from psannlm.data.corpus.documents import Document, ReadReport, builtin_documents, keep_text, read_documents
from psannlm.errors import CorpusError
from psannlm.runtime.progress import Progress


def read(*paths: Path, **settings: object) -> tuple[list[Document], ReadReport]:
    report = ReadReport()
    sources = [PathSource.model_validate({"path": str(path), **settings}) for path in paths]
    return list(read_documents(sources, report)), report


def texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


@pytest.mark.parametrize(
    "text", ["a\r\nb\r\n", "\0waves\0", "a\u2028b\x85c\x0cd", "  lead and trail \n\n", "🌊é\u200f"]
)
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_a_text_file_is_one_document_exactly_as_written(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    documents, report = read(path)
    assert documents == [Document(text, str(path))]
    assert (report.documents, report.files, report.bytes) == (1, 1, len(text.encode()))
    assert report.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_per_line_documents_end_only_at_line_feed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\n\n  \n two\u2028still\rtwo \x0b\nthree".encode())
    documents, report = read(path, per_line=True)
    assert texts(documents) == ["one", " two\u2028still\rtwo \x0b", "three"]
    assert [document.name for document in documents] == [f"{path}:{line}" for line in (1, 4, 5)]
    assert report.drops == {"blank line": 2}


def test_a_byte_order_mark_is_taken_off_and_counted(tmp_path: Path) -> None:
    for name, content in (("a.txt", b"waves"), ("b.jsonl", b'{"text": "tides"}\n')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    documents, report = read(tmp_path)
    assert texts(documents) == ["waves", "tides"]
    assert report.byte_order_marks == 2
    assert "removed 2 byte order marks" in str(report)


def test_invalid_byte_position_counts_whole_file(tmp_path: Path) -> None:
    for name, settings in (("a.txt", {"per_line": True}), ("a.jsonl", {})):
        lines = '{"text": "marée"}\r\n'.encode() * 3 + b'{"text": "caf\xe9"}\n'
        (tmp_path / name).write_bytes(lines)
        with pytest.raises(CorpusError, match=rf"{name}: byte {lines.index(0xE9)} is 0xE9"):
            read(tmp_path / name, **settings)


def test_json_lines_keep_their_text_exactly(tmp_path: Path) -> None:
    wanted = ["a\nb\r\n", "\0", "🌊 \u2028", '"quoted" \\ ']
    path = tmp_path / "a.jsonl.gz"
    lines = "\n".join(
        json.dumps({"body": text, "text": "other"}, ensure_ascii=bool(i % 2)) for i, text in enumerate(wanted)
    )
    path.write_bytes(gzip.compress(lines.encode()))
    documents, _ = read(path, text_key="body")
    assert texts(documents) == wanted
    assert documents[3].name == f"{path}:4"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a"', "not JSON: Expecting ',' delimiter at column 13"),
        ("[" * 100_000, "JSON that cannot be read"),
        ('{"text": 1' + "0" * 5000 + "}", "JSON that cannot be read"),
        ('["a"]', 'a line must be an object such as {"text": "..."}, not a list'),
        ('{"txt": "a", "id": 1}', "no key 'text' among 'txt', 'id' (did you mean 'txt'?)"),
        ("{}", "no key 'text' among none; name the key"),
        ('{"text": null}', "'text' must hold a string, not null"),
        ('{"text": 3}', "'text' must hold a string, not a number"),
        ('{"text": true}', "'text' must hold a string, not a boolean"),
        ('{"text": "\\ud800"}', "lone surrogate U+D800 at character 0"),
    ],
)
def test_bad_record_is_named_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line, encoding="utf-8")
    with pytest.raises(CorpusError) as raised:
        read(path)
    assert str(raised.value).startswith(f"{path}:3: ")
    assert said in str(raised.value)


def test_read_report_counts_and_names_omissions(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("waves")
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n\n{"text": "tides"}\n')
    (tmp_path / "empty.txt").touch()
    (tmp_path / "notes.md").write_text("not read")
    documents, report = read(tmp_path, tmp_path / "a.txt")
    assert texts(documents) == ["waves", "tides"]
    assert report.files == 4
    said = str(report)
    for reason, name, count in (
        ("empty file", "empty.txt", 1),
        ("blank document", "blank.txt, ", 2),
        ("blank line", "c.jsonl:2", 1),
        ("file of another kind", "notes.md", 1),
        ("file named before", "a.txt", 1),
    ):
        assert report.drops[reason] == count
        assert f"{reason} x {count}" in said
        assert name in said
    assert sum(report.drops.values()) == 6


def test_report_shortens_examples_but_counts_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n" * 999 + "waves")
    _, report = read(path, per_line=True)
    assert report.drops == {"blank line": 999}
    assert "x 999" in str(report)
    assert len(str(report)) < 2000


def test_missing_paths_are_all_named_before_reading(tmp_path: Path) -> None:
    (tmp_path / "waves.txt").write_bytes(b"\xff")
    sources = [PathSource(path=str(tmp_path / name)) for name in ("waves.txt", "wave.txt", "sea/*.txt")]
    with pytest.raises(CorpusError) as raised:
        read_documents(sources)
    assert "wave.txt: no such file or folder" in str(raised.value)
    assert "did you mean 'waves.txt'?" in str(raised.value)
    assert "sea/*.txt: nothing matches" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b" \n ", b"\xef\xbb\xbf"])
def test_corpus_without_text_error_lists_omissions(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=r"holds no text[^\0]*a\.txt"):
        read(tmp_path / "a.txt")


def test_documents_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "first"}\n{"broken')
    report = ReadReport()
    documents = read_documents([PathSource(path=str(path))], report)
    assert next(documents).text == "first"
    assert report.documents == 1
    with pytest.raises(CorpusError, match=":2:"):
        next(documents)


@given(st.lists(st.text(min_size=1).filter(lambda text: not text.isspace()), min_size=1, max_size=5))
def test_texts_at_hand_are_counted_like_files(given_texts: list[str]) -> None:
    report = ReadReport()
    kept = list(keep_text((Document(text, f"text {i + 1}") for i, text in enumerate(given_texts)), report))
    joined = "\0".join(given_texts).encode()
    assert texts(kept) == given_texts
    assert (report.documents, report.bytes) == (len(given_texts), sum(len(text.encode()) for text in given_texts))
    assert report.sha256 == hashlib.sha256(joined).hexdigest()


def test_parquet_rows_are_documents_and_bad_files_are_named(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    rows = [f"wave {i}\r\n" for i in range(600)]
    parquet.write_table(arrow.table({"id": list(range(600)), "text": rows}), path)
    documents, _ = read(path)
    assert texts(documents) == rows
    assert documents[-1].name == f"{path}:600"
    with pytest.raises(CorpusError, match=r"no column 'txt' among 'id', 'text' \(did you mean 'text'"):
        read(path, text_key="txt")
    with pytest.raises(CorpusError, match="row 1: 'id' must hold a string, not a number"):
        read(path, text_key="id")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorpusError, match=r"a\.parquet: not a whole Parquet file"):
        read(path)


def test_python_reference_is_one_document_per_topic() -> None:
    report = ReadReport()
    documents = list(read_documents([BuiltinSource(builtin="python-reference")], report))
    assert len(documents) > 50
    assert [document.name for document in documents] == sorted(document.name for document in documents)
    assert documents[0].name.startswith("python-reference/")
    joined = b"\0".join(document.text.encode() for document in documents)
    assert report.bytes == sum(document.n_bytes for document in documents) > 300_000
    (line,) = report.lines()
    for figure in (hashlib.sha256(joined).hexdigest(), f"{report.bytes:,} bytes", f"{len(documents)} topics"):
        assert figure in line


@pytest.mark.parametrize("topics", [None, {}, {"empty": "  "}])
def test_missing_python_reference_error_has_remedy(
    monkeypatch: pytest.MonkeyPatch, topics: dict[str, str] | None
) -> None:
    module = None if topics is None else ModuleType("pydoc_data.topics")
    if module is not None:
        module.topics = topics  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)  # type: ignore[arg-type]
    with pytest.raises(CorpusError, match=r"pydoc_data\.topics.*full standard library.*data\.sources"):
        builtin_documents()


@given(
    text=st.lists(st.sampled_from(["a", " ", "\n", "é", "日", "😀", "wort "]), max_size=60).map("".join),
    segment_bytes=st.integers(8, 40),
    has_mark=st.booleans(),
)
def test_parts_of_a_file_are_its_text(text: str, segment_bytes: int, has_mark: bool, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("parts") / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" * has_mark + ("x" + text).encode())
    whole, parted = ReadReport(), ReadReport()
    (document,) = read_documents([PathSource(path=str(path))], whole)
    parts = list(read_documents([PathSource(path=str(path))], parted, segment_bytes=segment_bytes))
    assert "".join(part.text for part in parts) == document.text == "x" + text
    assert all(len(part.text.encode()) <= segment_bytes for part in parts)
    assert [part.is_continuation for part in parts] == [False] + [True] * (len(parts) - 1)
    assert whole == parted
    assert whole.sha256 == parted.sha256


@pytest.mark.parametrize("segment_bytes", range(8, 16))
def test_no_character_is_cut_where_nothing_else_can_be(segment_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for letter in "é日😀":
        path.write_text(letter * 50, encoding="utf-8")
        parts = list(read_documents([PathSource(path=str(path))], segment_bytes=segment_bytes))
        assert "".join(part.text for part in parts) == letter * 50
        assert len(parts) > 1


def test_invalid_byte_is_found_in_any_segment(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"word " * 20 + b"\xff" + b" word" * 20)
    with pytest.raises(CorpusError, match="byte 100 is 0xFF"):
        list(read_documents([PathSource(path=str(path))], segment_bytes=16))


def test_leading_white_space_segments_are_counted_as_blank(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n" * 64 + "word" + "\n" * 64)
    report = ReadReport()
    parts = list(read_documents([PathSource(path=str(path))], report, segment_bytes=16))
    assert "".join(part.text for part in parts).strip() == "word"
    assert report.documents == 1
    assert report.drops["blank document"] > 0


def test_read_progress_counts_every_stored_byte_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words\n" * 50)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"other words\n" * 500))
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n' * 5)
    calls: list[Progress] = []
    list(read_documents([PathSource(path=str(tmp_path))], on_progress=calls.append))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert (calls[-1].done, calls[-1].unit) == (size, "bytes")
    assert [call.done for call in calls] == sorted(call.done for call in calls)
    assert {call.total for call in calls} == {size}


@pytest.mark.parametrize("name", ["a.ndjson", "a.ndjson.gz", "A.NDJSON"])
def test_ndjson_is_json_lines(tmp_path: Path, name: str) -> None:
    content = b'{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for path in (tmp_path, tmp_path / name):
        assert texts(read(path)[0]) == ["one", "two"]


def test_a_lone_surrogate_is_replaced_on_request_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine \\ud83d\\ude00"}\n{"text": "a \\ud83d b \\ude00\\ud83d"}\n')
    documents, report = read(path, errors="replace")
    assert texts(documents) == ["fine 😀", "a \ufffd b \ufffd\ufffd"]
    assert report.replaced_surrogates == 3
    assert f"replaced 3 lone surrogates by U+FFFD ({path}:2)" in report.lines()
    option = "errors: replace in that entry"
    with pytest.raises(CorpusError, match=rf"a\.jsonl:2: lone surrogate U\+D83D at character 2.* {option}"):
        list(read_documents([PathSource(path=str(path))], replace_option=option))


@pytest.mark.parametrize(("per_line", "name"), [(False, "a.txt"), (True, "a.txt:2")])
def test_bytes_that_are_not_utf8_are_replaced_on_request(tmp_path: Path, per_line: bool, name: str) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffmarée\n".encode() + b"caf\xe9 \xff\xff\n")
    documents, report = read(tmp_path / "a.txt", per_line=per_line, errors="replace")
    assert "".join(texts(documents)).replace("\n", "") == "maréecaf\ufffd \ufffd\ufffd"
    assert (report.replaced_bytes, report.byte_order_marks) == (3, 1)
    assert f"replaced 3 bytes that are not UTF-8 by U+FFFD ({tmp_path / name})" in report.lines()
    with pytest.raises(CorpusError, match=r"0xE9, which is not UTF-8.*; this option replaces them by U\+FFFD"):
        list(read_documents([PathSource(path=str(tmp_path / "a.txt"))], replace_option="this option"))


def test_a_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "meta": {"text": "other"}, "t": "\\"text\\""}\n{"text": "one", "text": "two"}\n')
    with pytest.raises(CorpusError, match=r"a\.jsonl:2: the key 'text' occurs more than once"):
        read(path)


@pytest.mark.parametrize(("name", "settings"), [("a.jsonl.gz", {}), ("a.txt.gz", {"per_line": True})])
def test_a_line_without_end_is_refused_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, object]
) -> None:
    monkeypatch.setattr("psannlm.data.corpus.reading.MAX_LINE_BYTES", 1 << 16)
    (tmp_path / name).write_bytes(gzip.compress(b'{"text": "fine"}\n{"text": "' + b"x" * (1 << 22), 1))
    with pytest.raises(CorpusError, match=rf"{name}:2: a line of more than"):
        read(tmp_path / name, **settings)


def test_read_documents_beyond_memory_recommends_prep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psannlm.data.corpus.documents.max_held_bytes", lambda: 1000)
    (tmp_path / "a.txt").write_text("0123456789\n" * 1000)
    sources = [PathSource(path=str(tmp_path / "a.txt"), per_line=True)]
    with pytest.raises(CorpusError, match=r"a\.txt:101: .*more than 1,000 bytes.*psannlm prep"):
        list(read_documents(sources))
    assert len(list(read_documents(sources, segment_bytes=1 << 10))) == 1000

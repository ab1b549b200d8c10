"""Detection of file formats by the first bytes."""

from __future__ import annotations

import bz2
import io
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import pytest

from psannlm.data.corpus.formats import HEAD_BYTES, compression, is_binary, unicode_encoding, why_not_text
from psannlm.data.corpus.reading import read_text
from psannlm.errors import CorpusError

TEXT = "The tide comes in twice a day.\nПривет, мир. 一二三。\n"


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "text")
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO(b""))
    return file.getvalue()


def database(folder: Path) -> bytes:
    with sqlite3.connect(folder / "d") as base:
        base.execute("create table t (x)")
    base.close()
    return (folder / "d").read_bytes()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (bz2.compress(TEXT.encode()), "bzip2 data"),
        (lzma.compress(TEXT.encode()), "xz data"),
        (zipped("a.txt"), "a zip archive"),
        (zipped("[Content_Types].xml", "word/document.xml"), r"a Word document \(.docx\)"),
        (tarred(), "a tar archive"),
        (b"PAR1\x15\x04\x15\x10", "a Parquet file, not text; rename it to end in .parquet"),
        (b"%PDF-1.7\n1 0 obj", "a PDF document"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a PNG image"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "a JPEG image"),
        (b"\x7fELF\x02\x01\x01" + bytes(9), "an ELF program"),
        (pickle.dumps({"text": "a"}, protocol=4), "a Python pickle"),
        (bytes(100), "binary data"),
        (b"a\0b\0\0c", "binary data"),
        (b"<!DOCTYPE html>\n<html><body>Hello", "an HTML page"),
        (b"\xef\xbb\xbf \n<!-- saved --><HTML lang='en'>\n<head>", "an HTML page"),
        (b'<?xml version="1.0"?>\n<html xmlns="x"><head>', "an HTML page"),
        (b"{\\rtf1\\ansi Hello}", "an RTF document"),
    ],
)
def test_file_not_text_is_refused_by_format(tmp_path: Path, content: bytes, said: str) -> None:
    for name in ("x.jsonl", "x.txt", "README"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CorpusError, match=rf"{name} is {said}") as raised:
            read_text(str(tmp_path / name))
        assert "latin1" not in str(raised.value)


def test_database_file_is_refused_by_format(tmp_path: Path) -> None:
    assert "is an SQLite database" in (why_not_text(database(tmp_path), "x") or "")


@pytest.mark.parametrize(
    "text",
    [
        "<html> is the root of every page, said the manual.",
        "<div align='center'>\n<h1>psannlm</h1></div>\n# Read me",
        "<?xml version='1.0'?><mediawiki><page>",
        'int main() { puts("<!doctype html>"); }',
        "BZh is how bzip2 files begin, PAR1 a table, MZ a program, ID3 a sound.",
        "PAR1 is how Parquet begins",
        "MZ was an engineer",
        "ORC: a format. BM: a picture. RIFF: a sound",
        "{\\rm roman} and {\\rtfm}",
        "\0waves\0",
        "\0 NUL </s> \t",
        "\x1b[31mred\x1b[0m",
        "\ufeffwith a mark",
        "",
    ],
)
def test_text_that_only_looks_like_another_format_is_text(text: str) -> None:
    assert why_not_text(text.encode(), "x") is None
    assert compression(text.encode()) == ""


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize(
    "text", ["The tide\n", "naïve café\r\n" * 900, "Привет, мир\n" * 900, "一二三四五。\n天地玄黃\n" * 900, "abc"]
)
def test_formats_detect_utf16_and_utf32_without_bom(codec: str, text: str) -> None:
    content = text.encode(codec)
    name = codec.replace("-le", "le").replace("-be", "be")
    for head in (content[:HEAD_BYTES], content[: HEAD_BYTES - 5]):
        assert unicode_encoding(head) == name
        assert f"iconv -f {name} -t utf-8 x.txt" in (why_not_text(head, "x.txt") or "")
    marked = ("\ufeff" + text).encode(codec)
    assert unicode_encoding(marked[:HEAD_BYTES]) == name[:6]


def test_other_encodings_are_neither_utf_16_nor_binary() -> None:
    for content in (TEXT.encode(), "Bush hid the facts. Café".encode("latin1"), "Привет, мир".encode("cp1251")):
        assert unicode_encoding(content) is None
        assert not is_binary(content)
    assert is_binary(bytes(range(1, 256)))

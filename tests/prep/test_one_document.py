"""The cut of a corpus of a single document, in ``prep`` as in training."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from psannlm.config.data import PathSource
from psannlm.data.corpus.documents import read_documents
from psannlm.data.prepare import split_documents
from psannlm.prep.pipeline import PrepResult

Prepare = Callable[..., PrepResult]
DocumentsIn = Callable[..., list[tuple[str, int, int]]]
LINE = "So shaken as we are, so wan with care 日本 🌊\n"


def book(n_bytes: int) -> bytes:
    """Return lines of text, ``n_bytes`` long, that ends where it ends."""
    content = (LINE.encode() * (n_bytes // len(LINE.encode()) + 1))[:n_bytes]
    return content.decode("utf-8", "ignore").encode().ljust(n_bytes, b".")


def write(folder: Path, kind: str, content: bytes) -> Path:
    path = folder / f"book{kind}"
    if kind == ".txt":
        path.write_bytes(content)
    elif kind == ".txt.gz":
        path.write_bytes(gzip.compress(content, 1))
    elif kind == ".jsonl":
        path.write_text(json.dumps({"text": content.decode()}) + "\n")
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"text": [content.decode()]}), path)
    return path


def sides(
    folder: Path, path: Path, documents_in: DocumentsIn, val_split: float
) -> tuple[list[list[str]], list[list[str]]]:
    """Return the texts of both sides, of prep and of training."""
    ours = [[text for text, *_ in documents_in(folder, side)] for side in ("train", "validation")]
    split = split_documents(list(read_documents([PathSource(path=str(path))])), val_split, 1337)
    return ours, [[document.text for document in side] for side in split]


@pytest.mark.slow
@pytest.mark.parametrize("n_bytes", [262_143, 262_144, 262_145, 300_000, 1_100_000])
def test_one_document_of_any_size_is_cut(
    prepare: Prepare, tmp_path: Path, documents_in: DocumentsIn, n_bytes: int
) -> None:
    path = write(tmp_path, ".txt", book(n_bytes))
    manifest = prepare(path, chunk_bytes=1 << 18).manifest
    assert (manifest.train.documents, manifest.validation.documents) == (1, 1)
    assert manifest.train.text_bytes + manifest.validation.text_bytes == n_bytes
    assert manifest.validation.text_bytes == pytest.approx(0.01 * n_bytes, rel=0.11)
    ours, theirs = sides(tmp_path / "out", path, documents_in, 0.01)
    assert ours == theirs
    assert ours[0][0] + ours[1][0] == path.read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [".txt", ".txt.gz", ".jsonl", ".parquet"])
@pytest.mark.parametrize(("n_bytes", "val_split"), [(2_000, 0.01), (600_001, 0.1), (600_001, 0.5)])
def test_one_document_is_cut_alike_in_every_packing(
    prepare: Prepare, tmp_path: Path, documents_in: DocumentsIn, kind: str, n_bytes: int, val_split: float
) -> None:
    path = write(tmp_path, kind, book(n_bytes))
    manifest = prepare(path, val_split=val_split, chunk_bytes=1 << 18).manifest
    assert manifest.train.text_bytes + manifest.validation.text_bytes == n_bytes
    ours, theirs = sides(tmp_path / "out", path, documents_in, val_split)
    assert ours == theirs


@pytest.mark.slow
def test_single_document_with_bom_or_replacements_same_cut(
    prepare: Prepare, tmp_path: Path, documents_in: DocumentsIn
) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + book(300_000))
    prepare(path, val_split=0.1)
    ours, theirs = sides(tmp_path / "out", path, documents_in, 0.1)
    assert ours == theirs
    path.write_bytes(book(300_000) + b"\xff" * 9)
    manifest = prepare(path, name="replaced", val_split=0.1, errors="replace").manifest
    assert (manifest.train.documents, manifest.validation.documents) == (1, 1)
    assert manifest.train.text_bytes + manifest.validation.text_bytes == 300_027


@pytest.mark.slow
@pytest.mark.parametrize("n_bytes", [900, 300_000])
def test_one_document_that_repeats_leaks_into_no_side(
    prepare: Prepare, tmp_path: Path, documents_in: DocumentsIn, n_bytes: int
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_bytes(book(n_bytes))
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "long.txt").write_bytes(book(n_bytes) * 2)
    manifest = prepare(tmp_path / "*.txt", val_split=0.1, min_chars=50, max_chars=n_bytes).manifest
    assert (manifest.train.documents, manifest.validation.documents, manifest.duplicates) == (1, 1, 2)
    (first, last) = [text for text, *_ in documents_in(tmp_path / "out")]
    assert first + last == book(n_bytes).decode()
    assert sum(manifest.drops.values()) == 2

"""Text columns of Parquet files: types, invalid bytes and limits."""

from __future__ import annotations

import bz2
import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from psannlm.data.corpus import parquet
from psannlm.data.corpus.parquet import parquet_texts
from psannlm.errors import CorpusError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
ROWS = ["one", "wåves 🌊", "", "one"]


def written(folder: Path, column: Any, name: str = "text", **settings: Any) -> str:
    path = folder / "a.parquet"
    pq.write_table(pa.table({"id": list(range(len(column))), name: column}), path, **settings)
    return str(path)


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "large_binary", "binary_view"])
def test_strings_and_bytes_are_text(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, pa.array([row.encode() for row in ROWS], getattr(pa, kind)()))
    assert list(parquet_texts(path, "text")) == [(i, row, 0) for i, row in enumerate(ROWS, start=1)]


@pytest.mark.parametrize("kind", ["string", "binary"])
def test_dictionaries_are_text(tmp_path: Path, kind: str) -> None:
    column = pa.array([row.encode() for row in ROWS], getattr(pa, kind)()).dictionary_encode()
    path = written(tmp_path, column)
    assert [text for _, text, _ in parquet_texts(path, "text")] == ROWS


@pytest.mark.parametrize("kind", ["string", "binary"])
@pytest.mark.parametrize("is_dictionary", [False, True])
def test_parquet_invalid_byte_is_named_or_replaced(tmp_path: Path, kind: str, is_dictionary: bool) -> None:
    column = pa.array([b"fine", b"caf\xe9 \xff"], pa.binary())
    column = column.view(pa.string()) if kind == "string" else column
    path = written(tmp_path, column.dictionary_encode() if is_dictionary else column)
    with pytest.raises(CorpusError, match=r"a\.parquet: row 2: byte 3 of 'text' is 0xE9.*; --errors replace replaces"):
        list(parquet_texts(path, "text", "strict", "--errors replace"))
    assert list(parquet_texts(path, "text", "replace"))[1] == (2, "caf\ufffd \ufffd", 2)


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ([1, 2], "a number of the type int64"),
        ([1.5], "a number of the type double"),
        ([["a"]], "a value of the type list<"),
        ([{"a": 1}], "a value of the type struct<"),
        ([True], "a value of the type bool"),
        ([None, "a"], "null"),
    ],
)
def test_parquet_column_not_text_is_named_by_type(tmp_path: Path, column: list[Any], said: str) -> None:
    path = written(tmp_path, column)
    with pytest.raises(CorpusError, match=f"row 1: 'text' must hold a string, not {said}"):
        list(parquet_texts(path, "text"))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(CorpusError, match="2 columns are named 'text'"):
        list(parquet_texts(path, "text"))


@pytest.mark.parametrize("packer", [gzip, bz2])
def test_parquet_name_with_other_format_is_refused(tmp_path: Path, packer: Any) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(packer.compress(b"text"))
    with pytest.raises(CorpusError, match=r"compressed|bzip2"):
        list(parquet_texts(str(path), "text"))


@pytest.mark.parametrize("settings", [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}])
def test_parquet_huge_cell_raises_before_unpacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(parquet, "MAX_LINE_BYTES", 1 << 20)
    path = written(tmp_path, ["x" * (40 << 20)], compression="zstd", **settings)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    with pytest.raises(CorpusError, match=r"rows 1 to 1: a text of 41,943,0\d\d bytes"):
        list(parquet_texts(path, "text"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20
    assert pa.total_allocated_bytes() - before < 4 << 20


def test_parquet_long_cell_error_names_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_LINE_BYTES", 1 << 16)
    path = written(tmp_path, [f"short {i}" for i in range(99)] + ["x" * (1 << 17)])
    with pytest.raises(CorpusError, match="row 100: a text of 131,072 bytes"):
        list(parquet_texts(path, "text"))


def test_parquet_repeated_long_value_limits_rows_per_read(tmp_path: Path) -> None:
    values = pa.array(["y" * (16 << 20)]).dictionary_encode()
    for number, column in enumerate((values.take(pa.array([0] * 40)), pa.array(["short"] * 40))):
        path = written(tmp_path, column, compression="zstd")
        with open(path, "rb") as file:
            assert parquet._rows_at_once(file, pq.read_metadata(path), "text", path) == (15, 64)[number]


@pytest.mark.parametrize("is_dictionary", [False, True])
def test_pages_are_walked_to_the_last(tmp_path: Path, is_dictionary: bool) -> None:
    rows = [f"{i} " + "word " * 100 for i in range(5000)]
    path = written(
        tmp_path, rows, data_page_size=5_000, write_batch_size=10, row_group_size=2000, use_dictionary=is_dictionary
    )
    metadata = pq.read_metadata(path)
    with open(path, "rb") as file:
        for group in range(metadata.num_row_groups):
            column = metadata.row_group(group).column(1)
            pages = list(parquet._pages(file, column, only_first=False))
            assert sum(page.n_values for page in pages if not page.is_dictionary) == column.num_values
            assert sum(page.is_dictionary for page in pages) == is_dictionary
            assert len(pages) > 1
            assert list(parquet._pages(file, column, only_first=True)) == pages[: 1 + is_dictionary]
    assert [text for _, text, _ in parquet_texts(path, "text")] == rows

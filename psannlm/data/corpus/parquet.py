"""Reader of a text column of Parquet files, row by row; the size of a page is checked before it is decompressed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from psannlm.data.corpus.formats import HEAD_BYTES, compression, why_not_text
from psannlm.data.corpus.reading import opened, replaced
from psannlm.display import shell_argument
from psannlm.errors import CorpusError, nearest
from psannlm.io.filenames import utf8_path
from psannlm.io.limits import MAX_LINE_BYTES, max_document_bytes
from psannlm.io.urls import is_remote

_ROWS = 64
_BATCH_BYTES = 256 << 20
_BUFFER_BYTES = 1 << 20
_MAGICS = (b"PAR1", b"PARE")
_HEADER_BYTES, _LONGEST_HEADER_BYTES = 1 << 12, 1 << 24
# Fields of a page header and values of its type, by their numbers in parquet.thrift.
_TYPE, _UNPACKED, _PACKED, _DATA, _DICTIONARY, _DATA_2 = 1, 2, 3, 5, 7, 8
_DICTIONARY_PAGE = 2
# Encodings in which a few bytes of a page may encode a value as long as the whole page.
_SHARED_PREFIXES = "DELTA_BYTE_ARRAY"


def parquet_texts(
    path: str, text_key: str, errors: str = "strict", replace_option: str = ""
) -> Iterator[tuple[int, str, int]]:
    """Yield (row from 1, text, replaced bytes) of a Parquet file, with a few rows in memory at a time.

    Columns of strings, of bytes, and dictionaries of them are read. With ``errors`` ``replace``, U+FFFD is put for
    bytes that are not UTF-8.

    Raises:
        CorpusError: the file is not a whole Parquet file, has no such column, or has two; or a row of it holds no text,
            more than may be held at once, or bytes that are not UTF-8 (recommends ``replace_option``).
    """
    # Imported by name: the package is an extra, and whether it is here was checked when the paths were looked up.
    parquet: Any = importlib.import_module("pyarrow.parquet")
    arrow: Any = importlib.import_module("pyarrow")
    try:
        with opened(path) if is_remote(path) else open(path, "rb") as file:
            _refuse_other_formats(file, path)
            # With a buffer a column is read page by page; without, a row group's whole column is in memory at once.
            with (
                nullcontext(file) if is_remote(path) else utf8_path(Path(path)) as source,
                parquet.ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False) as table,
            ):
                _check_names(table.schema_arrow.names, text_key, path)
                kind = str(table.schema_arrow.field(text_key).type)
                n_rows = _rows_at_once(file, table.metadata, text_key, path)
                row = 0
                for batch in table.iter_batches(batch_size=n_rows, columns=[text_key], use_threads=False):
                    for value in _contents(batch.column(0), arrow):
                        row += 1
                        yield row, *_text(value, f"{path}: row {row}", text_key, kind, errors, replace_option)
    except (arrow.ArrowException, OSError, UnicodeDecodeError, IndexError) as error:
        raise CorpusError(f"{path}: not a whole Parquet file ({error}); write it again") from error
    except MemoryError as error:
        raise CorpusError(f"{path}: memory ran out while it was read; write it with smaller row groups") from error


def _refuse_other_formats(file: BinaryIO, path: str) -> None:
    head = file.read(HEAD_BYTES)
    if head[:4] in _MAGICS:
        return
    if packing := compression(head):
        raise CorpusError(f"{path} is compressed ({packing}), not Parquet; unpack it, Parquet is compressed inside")
    if head and (problem := why_not_text(head, shell_argument(path))):
        raise CorpusError(f"{path} {problem}")


def _check_names(names: list[str], text_key: str, path: str) -> None:
    if text_key not in names:
        hint = nearest(text_key, names) or "; name the column that holds the text (text_key)"
        raise CorpusError(f"{path}: no column '{text_key}' among {', '.join(map(repr, names[:8]))}{hint}")
    if names.count(text_key) > 1:
        raise CorpusError(f"{path}: {names.count(text_key)} columns are named '{text_key}'; rename all but one")


def _contents(column: Any, arrow: Any) -> Iterator[Any]:
    """Yield the values of a column, strings as bytes that are not yet validated as UTF-8."""
    types = arrow.types
    if isinstance(column, arrow.ExtensionArray):
        column = column.storage
    if types.is_dictionary(column.type):
        values = _as_bytes(column.dictionary, arrow)
        for index in column.indices:
            yield values[index.as_py()].as_py() if index.is_valid else None
        return
    for value in _as_bytes(column, arrow):
        yield value.as_py()


def _as_bytes(column: Any, arrow: Any) -> Any:
    types = arrow.types
    for is_kind, name in (
        (types.is_string, "binary"),
        (types.is_large_string, "large_binary"),
        (types.is_string_view, "binary_view"),
    ):
        if is_kind(column.type):
            return column.view(getattr(arrow, name)())
    return column


def _text(value: Any, where: str, text_key: str, kind: str, errors: str, replace_option: str) -> tuple[str, int]:
    if not isinstance(value, bytes):
        found = "null" if value is None else f"a value of the type {kind}"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found = f"a number of the type {kind}"
        raise CorpusError(f"{where}: '{text_key}' must hold a string, not {found}")
    if len(value) > MAX_LINE_BYTES:
        raise CorpusError(f"{where}: {_too_long(len(value))}")
    try:
        return str(value, "utf-8"), 0
    except UnicodeDecodeError as error:
        if errors == "replace":
            text = value.decode("utf-8", "replace")
            return text, replaced(value, text)
        advice = f"; {replace_option} replaces it by U+FFFD" if replace_option else ""
        raise CorpusError(
            f"{where}: byte {error.start:,} of '{text_key}' is 0x{value[error.start]:02X}, which is not UTF-8{advice}"
        ) from error


def _too_long(n_bytes: int) -> str:
    return (
        f"a text of {n_bytes:,} bytes, and {MAX_LINE_BYTES:,} are the most that a row may hold; save so long a text as "
        "a .txt file"
    )


@dataclass(frozen=True)
class _Page:
    """Header of a page: its decompressed bytes, number of values, and whether it is a dictionary."""

    n_bytes: int
    n_values: int
    is_dictionary: bool


def _rows_at_once(file: BinaryIO, metadata: Any, text_key: str, path: str) -> int:
    """Return the number of rows to read at once, after checking the sizes of the pages of the column."""
    longest = 1
    first_row = 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for index in range(group.num_columns):
            column = group.column(index)
            if column.path_in_schema != text_key:
                continue
            for page in _pages(file, column, only_first=is_remote(path)):
                if page.n_bytes > MAX_LINE_BYTES * max(1, page.n_values) or page.n_bytes > max_document_bytes():
                    rows = f"rows {first_row:,} to {first_row + group.num_rows - 1:,}"
                    raise CorpusError(f"{path}: {rows}: {_too_long(page.n_bytes // max(1, page.n_values))}")
                if page.is_dictionary or _SHARED_PREFIXES in column.encodings:
                    longest = max(longest, page.n_bytes)
        first_row += group.num_rows
    return max(1, min(_ROWS, _BATCH_BYTES // longest))


def _pages(file: BinaryIO, column: Any, only_first: bool) -> Iterator[_Page]:
    """Yield the pages of one column of a row group; ``only_first``: the dictionary and the page after it."""
    at = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset is not None:
        at = min(at, column.dictionary_page_offset)
    end = at + column.total_compressed_size
    while at < end:
        header, n_header = _read_header(file, at)
        details = header.get(_DATA) or header.get(_DATA_2) or header.get(_DICTIONARY) or {}
        is_dictionary = header.get(_TYPE) == _DICTIONARY_PAGE
        yield _Page(header[_UNPACKED], details.get(1, 0), is_dictionary)
        if only_first and not is_dictionary:
            return
        at += n_header + max(0, header[_PACKED])


def _read_header(file: BinaryIO, at: int) -> tuple[dict[int, Any], int]:
    """Return the fields of the page header at a position in a file, and its length."""
    n_bytes = _HEADER_BYTES
    while True:
        file.seek(at)
        content = file.read(n_bytes)
        try:
            fields, end = _struct(content, 0)
            if not isinstance(fields.get(_UNPACKED), int) or not isinstance(fields.get(_PACKED), int):
                raise OSError("a page has no header")
            return fields, end
        except IndexError:
            # A header holds the least and the greatest value of its page, which may be long.
            if len(content) < n_bytes or n_bytes >= _LONGEST_HEADER_BYTES:
                raise OSError("a page has no whole header") from None
            n_bytes *= 16


def _struct(content: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Return (fields by number, end) of a structure in Thrift's compact protocol."""
    if depth > 8:
        raise OSError("a page header is nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    while content[at]:
        kind, step = content[at] & 15, content[at] >> 4
        at += 1
        if step:
            number += step
        else:
            number, at = _zigzag(content, at)
        fields[number], at = _value(kind, content, at, depth)
    return fields, at + 1


def _value(kind: int, content: bytes, at: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, at
    if kind == 3:
        return content[at], at + 1
    if kind in (4, 5, 6):
        return _zigzag(content, at)
    if kind == 7:
        return None, at + 8
    if kind == 8:
        n_bytes, at = _varint(content, at)
        return None, at + n_bytes
    if kind in (9, 10):
        n_items, of = content[at] >> 4, content[at] & 15
        at += 1
        if n_items == 15:
            n_items, at = _varint(content, at)
        for _ in range(n_items):
            _, at = _value(3 if of in (1, 2) else of, content, at, depth + 1)
        return None, at
    if kind == 12:
        return _struct(content, at, depth + 1)
    raise OSError(f"a page header holds a field of the unknown type {kind}")


def _zigzag(content: bytes, at: int) -> tuple[int, int]:
    number, at = _varint(content, at)
    return (number >> 1) ^ -(number & 1), at


def _varint(content: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = content[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
        if shift > 70:
            raise OSError("a page header holds a number without end")

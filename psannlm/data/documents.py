"""Sources as configured enter; documents of text leave one at a time, with a count of everything read or left out."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from psannlm.config.data import BuiltinSource, PathSource, Source
from psannlm.data.files import Seen, decoded, file_bytes, find_all, opened, split_suffix
from psannlm.errors import CorpusError, nearest

PYTHON_REFERENCE = "python-reference"
_NAMES_KEPT = 5
_PARQUET_ROWS = 64
_PARQUET_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """One source text and where it came from: ``path``, ``path:line``, ``python-reference/topic`` or ``text 3``.

    ``goes_on``: this is a later part of the text before it, which was too long to be held whole.
    """

    text: str
    name: str
    goes_on: bool = False

    @property
    def n_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text) if self.text.isascii() else len(self.text.encode("utf-8"))


@dataclass
class ReadReport:
    """What reading a corpus came to. ``drops`` counts what was left out by reason, ``examples`` names the first few."""

    files: int = 0
    documents: int = 0
    bytes: int = 0
    byte_order_marks: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    builtin: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    known_sha256: str | None = None
    _digest: Any = field(default_factory=hashlib.sha256, repr=False, compare=False)

    @property
    def sha256(self) -> str:
        """SHA-256 of all text so far in UTF-8, documents joined by a NUL; of one plain file, the file's own.

        Of a prepared folder, whose text is not read again, its ``content_sha256``.
        """
        if self.known_sha256 is not None:
            return self.known_sha256
        digest: str = self._digest.hexdigest()
        return digest

    def add(self, document: Document) -> None:
        """Count a document that was read. Raises CorpusError if its text is not Unicode text."""
        try:
            content = document.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise CorpusError(
                f"{document.name}: lone surrogate U+{ord(document.text[error.start]):04X} at character {error.start}, "
                "which is not Unicode text; remove it"
            ) from error
        self._digest.update(b"\0" + content if self.documents and not document.goes_on else content)
        self.documents += not document.goes_on
        self.bytes += len(content)

    def drop(self, reason: str, name: str) -> None:
        """Count something that was left out."""
        self.drops[reason] += 1
        names = self.examples.setdefault(reason, [])
        if len(names) < _NAMES_KEPT:
            names.append(name)

    def lines(self) -> list[str]:
        """Return the report in lines for people."""
        figures = f"{_count(self.documents, 'document')}, {self.bytes:,} bytes, sha256 {self.sha256}"
        if self.files:
            said = [f"corpus: {figures}, from {_count(self.files, 'file')}", *self.builtin.values()]
        else:
            said = [f"corpus: {line}" for line in self.builtin.values()] or [f"corpus: {figures}"]
        if self.byte_order_marks:
            said.append(f"took off {_count(self.byte_order_marks, 'byte order mark')}")
        for reason, count in sorted(self.drops.items()):
            more = ", ..." if count > len(self.examples[reason]) else ""
            said.append(f"left out: {reason} x {count:,} ({', '.join(self.examples[reason])}{more})")
        return said + self.warnings

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def read_documents(
    sources: Sequence[Source],
    report: ReadReport | None = None,
    *,
    part_bytes: int | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Iterator[Document]:
    """Return the documents of all sources in order, read as they are asked for; ``report`` is kept up to date.

    No more than one document (for .txt one file) is in memory. Blank documents are left out and counted. Paths are
    looked up now, contents are checked when reached.

    Args:
        part_bytes: files of one document come in parts of at most so many bytes, cut where a line ends if they can be.
        on_bytes: told the bytes read so far and the bytes of all files, as they are stored.

    Raises:
        CorpusError: now, naming every path that is missing or cannot be read; later, for damaged or undecodable files,
            malformed records, and, at the end, when there was no text at all.
    """
    report = ReadReport() if report is None else report
    patterns = [source.path for source in sources if isinstance(source, PathSource)]
    found = iter(find_all(patterns, report.drop))
    plan = [(source, next(found) if isinstance(source, PathSource) else []) for source in sources]
    meter = None if on_bytes is None else _Meter(sum(file_bytes(path) for _, files in plan for path in files), on_bytes)
    return keep_text(_read(plan, report, part_bytes, meter), report)


class _Meter:
    """Counts bytes that were read, and tells them."""

    def __init__(self, total: int, on_bytes: Callable[[int, int], None]) -> None:
        self._done, self._total, self._on_bytes = 0, total, on_bytes

    def seen(self, chunk: memoryview) -> None:
        self.add(len(chunk))

    def add(self, n_bytes: int) -> None:
        self._done += n_bytes
        self._on_bytes(self._done, self._total)


def keep_text(documents: Iterable[Document], report: ReadReport) -> Iterator[Document]:
    """Yield the documents that hold text and count all of them in ``report``.

    Raises:
        CorpusError: a document is not Unicode text, or, at the end, none held any text.
    """
    for document in documents:
        if not document.goes_on and (not document.text or document.text.isspace()):
            report.drop("blank document", document.name)
        else:
            report.add(document)
            yield document
    if not report.documents:
        left_out = "".join(f"\n  {line}" for line in report.lines()[1:])
        raise CorpusError(f"the corpus holds no text; name files with text in data.sources{left_out}")


def _read(
    plan: Sequence[tuple[Source, list[str]]], report: ReadReport, part_bytes: int | None, meter: _Meter | None
) -> Iterator[Document]:
    seen = None if meter is None else meter.seen
    for source, files in plan:
        if isinstance(source, BuiltinSource):
            documents = builtin_documents()
            report.builtin[source.builtin] = _describe_builtin(documents)
            yield from documents
            continue
        for path in files:
            report.files += 1
            kind, _ = split_suffix(path)
            if file_bytes(path) == 0:
                report.drop("empty file", path)
            elif kind == ".parquet":
                for row, text in parquet_texts(path, source.text_key):
                    yield Document(text, f"{path}:{row}")
                if meter is not None:
                    meter.add(file_bytes(path))
            elif kind == ".jsonl":
                yield from _json_lines(path, source.text_key, report, seen)
            elif source.per_line:
                for number, line in _lines(path, report, seen):
                    yield Document(line, f"{path}:{number}")
            else:
                yield from _whole(path, report, part_bytes, seen)


def _whole(path: str, report: ReadReport, part_bytes: int | None, seen: Seen | None) -> Iterator[Document]:
    """Yield a file as one document, in parts of ``part_bytes`` or less; white space at its start is no beginning."""
    with opened(path, seen) as file:
        offset = 0
        has_begun = False
        carry = b""
        while chunk := carry + (file.read(-1 if part_bytes is None else part_bytes - len(carry))):
            is_last = part_bytes is None or len(chunk) < part_bytes
            cut = len(chunk) if is_last else _line_cut(chunk)
            text, has_mark = decoded(chunk[:cut], path, offset)
            report.byte_order_marks += has_mark
            yield Document(text, path, goes_on=has_begun)
            has_begun = has_begun or bool(text and not text.isspace())
            carry, offset = chunk[cut:], offset + cut
        if not offset:
            yield Document("", path)  # a compressed file of nothing


def _line_cut(chunk: bytes) -> int:
    """Return where to cut: before the last newline of the second half, else its last space, else between characters."""
    half = len(chunk) // 2
    for boundary in (b"\n", b" "):
        if (cut := chunk.rfind(boundary, half)) > 0:
            return cut
    cut = len(chunk)
    while cut > len(chunk) - 4 and chunk[cut - 1] & 0xC0 == 0x80:
        cut -= 1
    # The first byte of a character that may go on stays with what follows.
    return cut - 1 if chunk[cut - 1] >= 0xC0 else len(chunk)


def builtin_documents() -> list[Document]:
    """Return the topics of Python's language reference (``pydoc_data.topics``), a document each, sorted by name.

    Raises:
        CorpusError: this Python was installed without them.
    """
    try:
        topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):
        topics = {}
    documents = [Document(topics[name], f"{PYTHON_REFERENCE}/{name}") for name in sorted(topics)]
    if not any(document.text.strip() for document in documents):
        raise CorpusError(
            f"the built-in corpus {PYTHON_REFERENCE} is pydoc_data.topics, and this Python came without it. Install "
            "the full standard library (Debian: apt install libpython3-stdlib; Fedora: dnf install python3-libs), or "
            "name text of your own in data.sources."
        )
    return documents


def _describe_builtin(documents: Sequence[Document]) -> str:
    report = ReadReport()
    for document in documents:
        report.add(document)
    return f"{PYTHON_REFERENCE}: {report.documents} topics, {report.bytes:,} bytes, sha256 {report.sha256}"


def _lines(path: str, report: ReadReport, seen: Seen | None) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without the line's end) of lines that are not blank."""
    offset = 0
    with opened(path, seen) as file:
        # Bytes are split, so that only \n ends a line; str.splitlines would break at U+2028 and a dozen others.
        for number, raw in enumerate(file, start=1):
            text, has_mark = decoded(raw, path, offset)
            report.byte_order_marks += has_mark
            offset += len(raw)
            text = text.removesuffix("\n").removesuffix("\r")
            if not text or text.isspace():
                report.drop("blank line", f"{path}:{number}")
            else:
                yield number, text


def _json_lines(path: str, text_key: str, report: ReadReport, seen: Seen | None) -> Iterator[Document]:
    for number, line in _lines(path, report, seen):
        where = f"{path}:{number}"
        yield Document(json_text(line, text_key, where), where)


def json_text(line: str, text_key: str, where: str) -> str:
    """Return the text of one line of a .jsonl file. Raises CorpusError, beginning with ``where``, if it holds none."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{where}: not JSON: {error.msg} at column {error.colno}; repair the line") from error
    except (RecursionError, ValueError) as error:
        raise CorpusError(f"{where}: JSON that cannot be read ({error}); repair the line") from error
    if not isinstance(record, dict):
        raise CorpusError(f'{where}: a line must be an object such as {{"{text_key}": "..."}}, not {_kind(record)}')
    if text_key not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        hint = nearest(text_key, record) or "; name the key that holds the text (text_key)"
        raise CorpusError(f"{where}: no key '{text_key}' among {keys}{hint}")
    text = record[text_key]
    if not isinstance(text, str):
        raise CorpusError(f"{where}: '{text_key}' must hold a string, not {_kind(text)}")
    return text


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def parquet_texts(path: str, text_key: str) -> Iterator[tuple[int, str]]:
    """Yield (row from 1, text) of a Parquet file, a few rows in memory at a time.

    Raises:
        CorpusError: the file is no whole Parquet file, has no such column, or a row of it holds no text.
    """
    # Imported by name: the package is an extra, and whether it is here was checked when the paths were looked up.
    parquet: Any = importlib.import_module("pyarrow.parquet")
    arrow: Any = importlib.import_module("pyarrow")
    try:
        # With a buffer a column is read page by page; without, a row group's whole column is in memory at once.
        with (
            # The library takes no name that is not UTF-8, so it is given the open file.
            opened(path) as file,
            parquet.ParquetFile(file, buffer_size=_PARQUET_BUFFER_BYTES, pre_buffer=False) as table,
        ):
            names = table.schema_arrow.names
            if text_key not in names:
                hint = nearest(text_key, names) or "; name the column that holds the text (text_key)"
                raise CorpusError(f"{path}: no column '{text_key}' among {', '.join(map(repr, names[:8]))}{hint}")
            row = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_key], use_threads=False):
                for value in batch.column(0):
                    row += 1
                    text = value.as_py()
                    if not isinstance(text, str):
                        raise CorpusError(f"{path}: row {row}: '{text_key}' must hold a string, not {_kind(text)}")
                    yield row, text
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: not a whole Parquet file ({error}); write it again") from error

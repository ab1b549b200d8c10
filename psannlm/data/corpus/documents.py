"""Reader of corpora: documents of the configured sources, one at a time, and a report of what was read and omitted."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from psannlm.config.data import BuiltinSource, PathSource, Source
from psannlm.data.corpus.files import JSON_LINES_SUFFIXES, file_bytes, find_all, split_suffix
from psannlm.data.corpus.parquet import parquet_texts
from psannlm.data.corpus.reading import REPLACEMENT, Seen, bounded_lines, decoded, opened, read_whole, replaced
from psannlm.errors import CorpusError, nearest
from psannlm.io.limits import max_held_bytes
from psannlm.runtime.progress import OnProgress, ProgressCounter

PYTHON_REFERENCE = "python-reference"
_NAMES_KEPT = 5
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One source text and where it came from: ``path``, ``path:line``, ``python-reference/topic`` or ``text 3``.

    ``is_continuation``: this text continues the document before it, which is too long to be held whole. ``source`` is
    the number of its source among those that were read together, from 0.
    """

    text: str
    name: str
    is_continuation: bool = False
    source: int = 0

    @property
    def n_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text) if self.text.isascii() else len(self.text.encode("utf-8"))


@dataclass
class ReadReport:
    """Result of reading a corpus. ``drops``: omitted documents by reason; ``examples``: names of the first few."""

    files: int = 0
    documents: int = 0
    bytes: int = 0
    byte_order_marks: int = 0
    replaced_bytes: int = 0
    replaced_surrogates: int = 0
    replaced_in: list[str] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    builtin: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    known_sha256: str | None = None
    _digest: Any = field(default_factory=hashlib.sha256, repr=False, compare=False)

    @property
    def sha256(self) -> str:
        """SHA-256 of all text so far in UTF-8, documents joined by NUL; for one plain file, that of the file.

        For a prepared folder, whose text is not read again, its ``content_sha256``.
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
        self._digest.update(b"\0" + content if self.documents and not document.is_continuation else content)
        self.documents += not document.is_continuation
        self.bytes += len(content)

    def replace(self, name: str, n_bytes: int, n_surrogates: int = 0) -> None:
        """Count bytes that are not UTF-8, and lone surrogates, that were replaced by U+FFFD."""
        self.replaced_bytes += n_bytes
        self.replaced_surrogates += n_surrogates
        if len(self.replaced_in) <= _NAMES_KEPT and name not in self.replaced_in:
            self.replaced_in.append(name)

    def drop(self, reason: str, name: str) -> None:
        """Count an omitted document or file."""
        self.drops[reason] += 1
        names = self.examples.setdefault(reason, [])
        if len(names) < _NAMES_KEPT:
            names.append(name)

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        figures = f"{_count(self.documents, 'document')}, {self.bytes:,} bytes, sha256 {self.sha256}"
        if self.files:
            lines = [f"corpus: {figures}, from {_count(self.files, 'file')}", *self.builtin.values()]
        else:
            lines = [f"corpus: {line}" for line in self.builtin.values()] or [f"corpus: {figures}"]
        if self.byte_order_marks:
            lines.append(f"removed {_count(self.byte_order_marks, 'byte order mark')}")
        if line := replaced_line(self.replaced_bytes, self.replaced_surrogates, self.replaced_in):
            lines.append(line)
        for reason, count in sorted(self.drops.items()):
            more = ", ..." if count > len(self.examples[reason]) else ""
            lines.append(f"left out: {reason} x {count:,} ({', '.join(self.examples[reason])}{more})")
        return lines + self.warnings

    def __str__(self) -> str:
        return "\n".join(self.lines())


def replaced_line(n_bytes: int, n_surrogates: int, names: Sequence[str]) -> str | None:
    """Return one line about what was replaced by U+FFFD, or None if nothing was."""
    counted = [f"{n_bytes:,} bytes that are not UTF-8"] if n_bytes else []
    counted += [f"{n_surrogates:,} lone surrogates"] if n_surrogates else []
    more = ", ..." if len(names) > _NAMES_KEPT else ""
    return f"replaced {' and '.join(counted)} by U+FFFD ({', '.join(names[:_NAMES_KEPT])}{more})" if counted else None


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def read_documents(
    sources: Sequence[Source],
    report: ReadReport | None = None,
    *,
    segment_bytes: int | None = None,
    on_progress: OnProgress | None = None,
    replace_option: str = "",
) -> Iterator[Document]:
    """Return an iterator of the documents of all sources, in order; ``report`` is updated as they are read.

    At most one document (of .txt one file) is in memory, and Parquet is read a few rows at a time. Without
    ``segment_bytes`` the caller is assumed to hold all documents, and at most half of the machine's memory is read.
    Blank documents are left out and counted. Paths are checked now, contents when they are read.

    Args:
        segment_bytes: maximum size of a document; a longer file is cut, at the end of a line if possible.
        on_progress: gets the stored bytes read so far, of those of all files.
        replace_option: the remedy in errors about bytes that are not UTF-8, as the command calls it.

    Raises:
        CorpusError: at once, for paths that are missing or cannot be read (all are named); later, for damaged or
            undecodable files and malformed records, and, at the end, if there was no text.
    """
    report = ReadReport() if report is None else report
    patterns = [source.path for source in sources if isinstance(source, PathSource)]
    found = iter(find_all(patterns, report.drop))
    plan = [(source, next(found) if isinstance(source, PathSource) else []) for source in sources]
    on_read = None
    if on_progress is not None:
        total = sum(file_bytes(path) for _, files in plan for path in files)
        on_read = ProgressCounter(on_progress, "reading", "bytes", total).add
    reading = _Reading(report, segment_bytes, on_read, replace_option)
    kept = keep_text(_read(plan, reading), report)
    return kept if segment_bytes is not None else _held(kept, report)


def _held(documents: Iterable[Document], report: ReadReport) -> Iterator[Document]:
    """Yield documents that the caller holds at once. Raises CorpusError above half of the machine's memory."""
    limit = max_held_bytes()
    for document in documents:
        if report.bytes > limit:
            raise CorpusError(
                f"{document.name}: the corpus up to here has more than {limit:,} bytes, half of this machine's memory, "
                "and is held in memory; prepare it with psannlm prep and name that folder"
            )
        yield document


@dataclass(frozen=True)
class _Reading:
    """How files are read, and the report to update."""

    report: ReadReport
    segment_bytes: int | None
    on_read: Callable[[int], None] | None
    replace_option: str

    @property
    def seen(self) -> Seen | None:
        """Callback for the stored bytes of a file."""
        on_read = self.on_read
        return None if on_read is None else lambda content: on_read(len(content))

    def text(self, content: bytes | bytearray, path: str, offset: int, errors: str, number: int = 0) -> str:
        """Return the text of bytes from ``offset`` of ``path`` on, line ``number``, and count marks and errors."""
        if errors == "replace":
            has_mark = offset == 0 and content.startswith(b"\xef\xbb\xbf")
            body = content[3:] if has_mark else content
            text = body.decode("utf-8", "replace")
            if REPLACEMENT in text and (n_bytes := replaced(body, text)):
                self.report.replace(f"{path}:{number}" if number else path, n_bytes)
        else:
            advice = f"; {self.replace_option} replaces them by U+FFFD" if self.replace_option else ""
            text, has_mark = decoded(content, path, offset, advice)
        self.report.byte_order_marks += has_mark
        return text


def keep_text(documents: Iterable[Document], report: ReadReport) -> Iterator[Document]:
    """Yield the documents that are not blank, and count all documents in ``report``.

    Raises:
        CorpusError: a document is not Unicode text, or, at the end, all documents were blank.
    """
    for document in documents:
        if not document.is_continuation and (not document.text or document.text.isspace()):
            report.drop("blank document", document.name)
        else:
            report.add(document)
            yield document
    if not report.documents:
        left_out = "".join(f"\n  {line}" for line in report.lines()[1:])
        raise CorpusError(f"the corpus holds no text; name files with text{left_out}")


def _read(plan: Sequence[tuple[Source, list[str]]], reading: _Reading) -> Iterator[Document]:
    for number, (source, files) in enumerate(plan):
        for document in _read_source(source, files, reading):
            yield document if number == 0 else replace(document, source=number)


def _read_source(source: Source, files: list[str], reading: _Reading) -> Iterator[Document]:
    report = reading.report
    if isinstance(source, BuiltinSource):
        documents = builtin_documents()
        report.builtin[source.builtin] = _describe_builtin(documents)
        yield from documents
        return
    for path in files:
        report.files += 1
        kind, _ = split_suffix(path)
        if file_bytes(path) == 0:
            report.drop("empty file", path)
        elif kind == ".parquet":
            yield from _rows(path, source, reading)
        elif kind in JSON_LINES_SUFFIXES:
            yield from _json_lines(path, source, reading)
        elif source.per_line:
            for number, line in _lines(path, source, reading):
                yield Document(line, f"{path}:{number}")
        else:
            yield from _whole(path, source, reading)


def _rows(path: str, source: PathSource, reading: _Reading) -> Iterator[Document]:
    for row, text, n_bytes in parquet_texts(path, source.text_key, source.errors, reading.replace_option):
        if n_bytes:
            reading.report.replace(f"{path}:{row}", n_bytes)
        yield Document(text, f"{path}:{row}")
    if reading.on_read is not None:
        # Columns are not contiguous: progress is reported per file.
        reading.on_read(file_bytes(path))


def _whole(path: str, source: PathSource, reading: _Reading) -> Iterator[Document]:
    """Yield a file as one document, cut to ``segment_bytes``; leading white space is not a document to continue."""
    segment_bytes = reading.segment_bytes
    with opened(path, reading.seen) as file:
        if segment_bytes is None:
            yield Document(reading.text(read_whole(file, path), path, 0, source.errors), path)
            return
        offset = 0
        has_begun = False
        carry = b""
        while chunk := carry + file.read(segment_bytes - len(carry)):
            is_last = len(chunk) < segment_bytes
            cut = len(chunk) if is_last else _line_cut(chunk)
            text = reading.text(chunk[:cut], path, offset, source.errors)
            yield Document(text, path, is_continuation=has_begun)
            has_begun = has_begun or bool(text and not text.isspace())
            carry, offset = chunk[cut:], offset + cut
        if not offset:
            yield Document("", path)  # a compressed file of nothing


def _line_cut(chunk: bytes) -> int:
    """Return the cut: before the last newline of the second half, else its last space, else between characters."""
    half = len(chunk) // 2
    for boundary in (b"\n", b" "):
        if (cut := chunk.rfind(boundary, half)) > 0:
            return cut
    cut = len(chunk)
    while cut > len(chunk) - 4 and chunk[cut - 1] & 0xC0 == 0x80:
        cut -= 1
    # The first byte of a character that may be incomplete belongs to the next segment.
    return cut - 1 if chunk[cut - 1] >= 0xC0 else len(chunk)


def builtin_documents() -> list[Document]:
    """Return the topics of Python's language reference (``pydoc_data.topics``), one document each, sorted by name.

    Raises:
        CorpusError: this Python installation lacks them.
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


def _lines(path: str, source: PathSource, reading: _Reading) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without its newline) of lines that are not blank."""
    offset = 0
    with opened(path, reading.seen) as file:
        # Bytes are split, so that only \n ends a line; str.splitlines would break at U+2028 and a dozen others.
        for number, raw in enumerate(bounded_lines(file, path), start=1):
            text = reading.text(raw, path, offset, source.errors, number)
            offset += len(raw)
            text = text.removesuffix("\n").removesuffix("\r")
            if not text or text.isspace():
                reading.report.drop("blank line", f"{path}:{number}")
            else:
                yield number, text


def _json_lines(path: str, source: PathSource, reading: _Reading) -> Iterator[Document]:
    for number, line in _lines(path, source, reading):
        where = f"{path}:{number}"
        text = json_text(line, source.text_key, where)
        text, n_surrogates = without_surrogates(text, source.errors, where, reading.replace_option)
        if n_surrogates:
            reading.report.replace(where, 0, n_surrogates)
        yield Document(text, where)


def without_surrogates(text: str, errors: str, where: str, option: str) -> tuple[str, int]:
    """Replace lone surrogates, which a JSON string can hold, by U+FFFD; return the text and their number.

    Raises:
        CorpusError: there is one and ``errors`` is ``strict``; recommends ``option``.
    """
    if text.isascii() or (found := _SURROGATE.search(text)) is None:
        return text, 0
    if errors == "strict":
        advice = f", or use {option}, which replaces it by U+FFFD" if option else ""
        raise CorpusError(
            f"{where}: lone surrogate U+{ord(found[0]):04X} at character {found.start()}, which is not Unicode text; "
            f"remove it{advice}"
        )
    return _SURROGATE.subn(REPLACEMENT, text)


def json_text(line: str, text_key: str, where: str) -> str:
    """Return the text of one line of a .jsonl file. Raises CorpusError, which names ``where``, if it has none."""
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # Called for the innermost object first and for the whole record last.
        repeated[:] = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        return dict(pairs)

    try:
        record = json.loads(line, object_pairs_hook=unique if line.count(f'"{text_key}"') > 1 else None)
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
    if text_key in repeated:
        raise CorpusError(f"{where}: the key '{text_key}' occurs more than once; rename or remove the others")
    text = record[text_key]
    if not isinstance(text, str):
        raise CorpusError(f"{where}: '{text_key}' must hold a string, not {_kind(text)}")
    return text


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")

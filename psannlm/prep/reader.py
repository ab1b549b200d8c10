"""Reader of corpus files for ``prep``: sections of bytes in reading order, and the SHA-256 of each file.

Section boundaries depend on the files alone. Workers decode the text, except for a document that is longer than a
segment: its segments go to different workers and its hash covers all of them, so it is decoded here.
"""

from __future__ import annotations

import codecs
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, BinaryIO

from psannlm.data.corpus.files import JSON_LINES_SUFFIXES, STDIN, file_stamp, find_all, split_suffix
from psannlm.data.corpus.parquet import parquet_texts
from psannlm.data.corpus.reading import REPLACEMENT, decoded, is_compressed, opened, replaced
from psannlm.data.framing import HASH_BYTES
from psannlm.data.split import SEGMENT_BYTES, cut_blocks, cut_segment_stream
from psannlm.errors import ConfigError, CorpusError
from psannlm.io.limits import MAX_LINE_BYTES
from psannlm.prep.chunks import BEGINS, ENDS, FILE, HALF, JSON_LINES, LINES, TEXT, Section
from psannlm.prep.job import REPLACE_ADVICE, REPLACE_OPTION, PrepSettings

LONGEST_JSON_LINE_BYTES = MAX_LINE_BYTES
_MARK = codecs.BOM_UTF8


@dataclass(frozen=True)
class Cut:
    """Cut of the single document of a corpus: its source, record, and ``n_bytes`` of UTF-8.

    ``n_bytes`` None: the size of the file, without a byte order mark.
    """

    source: int
    record: int
    n_bytes: int | None


@dataclass
class Replaced:
    """Bytes that were not UTF-8 and were replaced by U+FFFD, and where."""

    n_bytes: int = 0
    names: list[str] = field(default_factory=list)


class CorpusReader:
    """Reads the sources ``indices`` in order; ``digests`` collects the SHA-256 of the stored bytes of each.

    ``n_bytes``: stored bytes read so far; ``byte_order_marks``: number of long documents that began with one. Workers
    count those of their own sections.
    """

    def __init__(
        self,
        sources: Sequence[SourceFile] | Mapping[int, SourceFile],
        indices: Iterable[int],
        settings: PrepSettings,
        chunk_bytes: int,
        drops: Drops,
        cut: Cut | None = None,
    ) -> None:
        self._reset()
        self._sources, self._indices, self._settings = sources, indices, settings
        self._chunk_bytes, self._drops, self._cut = chunk_bytes, drops, cut
        self._digest: Any = None

    def _reset(self) -> None:
        self.n_bytes = 0
        self.byte_order_marks = 0
        self.replaced = Replaced()
        self.digests: dict[int, str] = {}

    def sections(self) -> Iterator[tuple[Section, bytes]]:
        """Yield sections and their bytes.

        Raises:
            CorpusError: a file cannot be read, is damaged, is not text, or changed since the preparation began.
        """
        for index in self._indices:
            source = self._sources[index]
            refuse_changed(source)
            self._digest = hashlib.sha256()
            before = self.n_bytes
            if source.n_bytes == 0:
                self._drops.add("empty file", source.path)
            elif source.kind == ".parquet":
                yield from self._rows(index, source.path)
            else:
                with opened(source.path, self._seen) as file:
                    if source.kind in JSON_LINES_SUFFIXES or (
                        source.path == STDIN and self._settings.stdin_format == "jsonl"
                    ):
                        yield from self._lines(index, file, JSON_LINES)
                    elif self._settings.per_line:
                        yield from self._lines(index, file, LINES)
                    else:
                        yield from self._whole(index, file)
            if source.n_bytes is not None and self.n_bytes - before != source.n_bytes:
                raise CorpusError(
                    f"{source.path} changed while it was read; run prep again once its files no longer change"
                )
            refuse_changed(source)
            self.digests[index] = self._digest.hexdigest()

    def _seen(self, content: memoryview) -> None:
        self._digest.update(content)
        self.n_bytes += len(content)

    def _rows(self, index: int, path: str) -> Iterator[tuple[Section, bytes]]:
        """Yield the rows of a Parquet file; a column is not contiguous, so the file is hashed in a pass of its own."""
        with opened(path, self._seen):
            pass
        for row, text, n_replaced in parquet_texts(
            path, self._settings.text_key, self._settings.errors, REPLACE_OPTION
        ):
            if n_replaced:
                self.replaced.n_bytes += n_replaced
                self.replaced.names.append(f"{path}:{row}")
            content = text.encode("utf-8")
            if len(content) <= SEGMENT_BYTES:
                yield Section(TEXT, index, row, 0, len(content)), content
            else:
                yield from self._long(index, row, [content], _Place(-1, is_stored=False))

    def _whole(self, index: int, file: BinaryIO) -> Iterator[tuple[Section, bytes]]:
        content = _read_full(file, SEGMENT_BYTES + 1)
        if len(content) <= SEGMENT_BYTES:
            yield Section(FILE, index, 0, 0, len(content), at=0), content
        else:
            rest = iter(lambda: file.read(SEGMENT_BYTES), b"")
            stored = self._sources[index].n_bytes
            n_stored = None if stored is None else stored - len(_MARK) * content.startswith(_MARK)
            place = _Place(0)
            blocks = self._checked(index, 0, chain([content], rest), place)
            yield from self._long(index, 0, blocks, place, n_stored)

    def _lines(self, index: int, file: BinaryIO, kind: str) -> Iterator[tuple[Section, bytes]]:
        held = bytearray()  # the beginning of a line whose end is not read yet
        record, offset = 1, 0  # of that line
        while block := _read_full(file, self._chunk_bytes):
            end = block.rfind(b"\n") + 1
            if end:
                content = b"".join((held, memoryview(block)[:end]))
                yield Section(kind, index, record, offset, len(content), at=offset), content
                record += content.count(b"\n")
                offset += len(content)
                held = bytearray(memoryview(block)[end:])
                continue
            held += block
            if kind == LINES and len(held) > SEGMENT_BYTES:
                line, place = _Line(bytes(held), file), _Place(offset)
                yield from self._long(index, record, self._checked(index, record, line, place), place)
                record, offset, held = record + 1, offset + line.n_bytes, bytearray(line.rest)
            elif len(held) > LONGEST_JSON_LINE_BYTES:
                raise CorpusError(
                    f"{self._sources[index].path}:{record}: a line of more than {LONGEST_JSON_LINE_BYTES >> 20} MiB, "
                    "the maximum for JSON; save so long a text as a .txt file"
                )
        if held:
            yield Section(kind, index, record, offset, len(held), at=offset), bytes(held)

    def _checked(self, index: int, record: int, blocks: Iterable[bytes], place: _Place) -> Iterator[bytes]:
        """Yield the bytes, which begin at ``place``, as valid UTF-8 that is cut between characters."""
        path, offset = self._sources[index].path, place.at
        decoder = codecs.getincrementaldecoder("utf-8")(self._settings.errors)
        for block in chain(filter(None, blocks), [b""]):
            content = decoder.getstate()[0] + block
            if offset == 0 and content.startswith(_MARK):
                self.byte_order_marks += 1
                decoder.reset()
                block = content = content[len(_MARK) :]
                offset = place.at = len(_MARK)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError:
                decoded(content, path, offset, REPLACE_ADVICE)
                raise
            valid = content[: len(content) - len(decoder.getstate()[0])]
            offset += len(valid)
            if REPLACEMENT in text and (n_bytes := replaced(valid, text)):
                self.replaced.n_bytes += n_bytes
                self.replaced.names.append(f"{path}:{record}" if record else path)
                valid = text.encode("utf-8")
                place.is_stored = False
            if valid:
                yield valid

    def _long(
        self, index: int, record: int, blocks: Iterable[bytes], place: _Place, n_stored: int | None = None
    ) -> Iterator[tuple[Section, bytes]]:
        """Yield the segments of a long document, or of both halves of it where the corpus is cut.

        ``n_stored``: its length, used if the cut has none.
        """
        cut = self._cut
        if cut is None or (cut.source, cut.record) != (index, record):
            yield from _document(index, record, blocks, place, 0)
            return
        n_bytes = n_stored if cut.n_bytes is None else cut.n_bytes
        assert n_bytes is not None, "only a whole file is cut before its length is known"
        for half in cut_blocks(blocks, n_bytes, self._settings.val_split):
            yield from _document(index, record, half, place, HALF)


@dataclass
class _Place:
    """Position in a file of the next segment of a long document; ``is_stored``: its bytes are there as such."""

    at: int
    is_stored: bool = True


def _document(
    index: int, record: int, blocks: Iterable[bytes], place: _Place, half: int
) -> Iterator[tuple[Section, bytes]]:
    """Yield the segments of one document that is read in blocks."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    flags, offset = BEGINS | half, 0
    for content, is_last in cut_segment_stream(blocks):
        digest.update(content)
        flags |= ENDS if is_last else 0
        hashed = digest.hexdigest() if is_last else ""
        at = place.at if place.is_stored else -1
        yield Section(TEXT, index, record, offset, len(content), flags, hashed, at), content
        offset += len(content)
        place.at += len(content)
        flags = half


class _Line:
    """The bytes of one long line without its newline; ``rest``: bytes read after it; ``n_bytes``: its length."""

    def __init__(self, begin: bytes, file: BinaryIO) -> None:
        self._begin, self._file = begin, file
        self.rest = b""
        self.n_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        held = self._begin
        while True:
            # A carriage return at the end of the block may belong to the newline that follows.
            at = len(held) - held.endswith(b"\r")
            self.n_bytes += at
            yield held[:at]
            block = self._file.read(SEGMENT_BYTES)
            held = held[at:] + block
            end = held.find(b"\n")
            if end >= 0:
                self.rest = held[end + 1 :]
                self.n_bytes += end + 1
                yield held[:end].removesuffix(b"\r")
                return
            if not block:
                self.n_bytes += len(held)
                yield held.removesuffix(b"\r")
                return


def _read_full(file: BinaryIO, n_bytes: int) -> bytes:
    """Read ``n_bytes``, or up to the end: pipes and decompressors return less per call."""
    content = b""
    while len(content) < n_bytes and (block := file.read(n_bytes - len(content))):
        content += block
    return content


_NAMES_KEPT = 5


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus: ``n_bytes`` as stored (None for standard input) and ``stamp``, its modification time."""

    path: str
    n_bytes: int | None
    stamp: str = ""

    @property
    def kind(self) -> str:
        """``.txt``, ``.jsonl``, ``.ndjson``, ``.parquet``, or any other suffix, which is read as plain text."""
        return split_suffix(self.path)[0]

    @property
    def is_compressed(self) -> bool:
        """Whether the content is compressed, whatever the name of the file."""
        return is_compressed(self.path)

    def as_dict(self) -> dict[str, Any]:
        """Return the file as it is stored in a plan."""
        return {"path": self.path, "bytes": self.n_bytes, "stamp": self.stamp}


@dataclass
class Drops:
    """Number of omitted files and documents per reason, with the names of the first few."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one."""
        self.merge(reason, 1, [name])

    def merge(self, reason: str, count: int, names: Sequence[str]) -> None:
        """Count several, of which ``names`` are the first."""
        self.counts[reason] += count
        kept = self.examples.setdefault(reason, [])
        kept += names[: _NAMES_KEPT - len(kept)]

    def lines(self) -> list[str]:
        """Return one line of text per reason."""
        lines = []
        for reason, count in sorted(self.counts.items()):
            names = self.examples[reason]
            more = ", ..." if count > len(names) else ""
            lines.append(f"left out: {reason} x {count:,} ({', '.join(names)}{more})")
        return lines


def find_sources(patterns: Sequence[str], drops: Drops) -> list[SourceFile]:
    """Return the files that ``patterns`` match, in reading order; ``-`` is standard input.

    Raises:
        CorpusError: names every path that is missing or cannot be read.
        ConfigError: standard input is named more than once.
    """
    if patterns.count(STDIN) > 1:
        raise ConfigError("'-' is standard input, which can be read only once; give it once")
    found = iter(find_all([pattern for pattern in patterns if pattern != STDIN], drops.add))
    sources: list[SourceFile] = []
    for pattern in patterns:
        if pattern == STDIN:
            sources.append(SourceFile(STDIN, None))
        else:
            sources += [SourceFile(path, *file_stamp(path)) for path in next(found)]
    return sources


def refuse_changed(source: SourceFile) -> None:
    """Raise CorpusError if a file changed since the preparation began."""
    if source.n_bytes is None:
        return
    n_bytes, stamp = file_stamp(source.path)
    if (n_bytes, stamp) != (source.n_bytes, source.stamp):
        what = f"{source.n_bytes:,} bytes then, {n_bytes:,} now" if n_bytes != source.n_bytes else "written to since"
        raise CorpusError(
            f"{source.path} changed while the corpus was prepared ({what}). Remove the folder and run prep again "
            "once the files no longer change"
        )


def deal(sources: Sequence[SourceFile], n_parts: int) -> list[list[int]]:
    """Return for each part the indices of its files, in reading order; parts are balanced by bytes.

    Files are assigned from the largest on, each to the smallest part: the same files always give the same parts.

    Raises:
        ConfigError: a source is standard input, or there are fewer files than parts.
    """
    if n_parts > 1 and any(source.n_bytes is None for source in sources):
        raise ConfigError("standard input cannot be split into parts; save it to files first")
    if n_parts > len(sources):
        raise ConfigError(
            f"{n_parts} parts are more than the {len(sources)} files, and a part holds whole files. "
            "Split the files, or use fewer parts"
        )
    parts: list[list[int]] = [[] for _ in range(n_parts)]
    sizes = [0] * n_parts
    for index in sorted(range(len(sources)), key=lambda index: (-(sources[index].n_bytes or 0), index)):
        least = min(range(n_parts), key=lambda part: (sizes[part], len(parts[part]), part))
        parts[least].append(index)
        sizes[least] += sources[index].n_bytes or 0
    return [sorted(part) for part in parts]

"""The files of a corpus enter; sections of bytes leave in reading order, every stored byte hashed in passing.

Where sections are cut depends on the files alone. Nothing is decoded here that a worker can decode: only a document
that is longer than a segment is, for its parts go to different workers and its hash covers them all.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, BinaryIO

from psannlm.data.files import JSON_LINES_SUFFIXES, REPLACEMENT, STDIN, decoded, opened, replaced
from psannlm.data.framing import HASH_BYTES
from psannlm.data.parquet import parquet_texts
from psannlm.data.segments import SEGMENT_BYTES, cut_stream
from psannlm.data.split import cut_blocks
from psannlm.errors import CorpusError
from psannlm.io.limits import MAX_LINE_BYTES
from psannlm.prep.chunks import BEGINS, ENDS, FILE, HALF, JSON_LINES, LINES, TEXT, Section
from psannlm.prep.settings import REPLACE_ADVICE, REPLACE_OPTION, PrepSettings
from psannlm.prep.sources import Drops, SourceFile, refuse_changed

LONGEST_JSON_LINE_BYTES = MAX_LINE_BYTES
_MARK = codecs.BOM_UTF8


@dataclass(frozen=True)
class Cut:
    """The single document of a corpus, which is cut in two: this record of this source, ``n_bytes`` of UTF-8.

    ``n_bytes`` None: all that is stored of the file, but for a byte order mark.
    """

    source: int
    record: int
    n_bytes: int | None


@dataclass
class Replaced:
    """Bytes that were not UTF-8, where each run of them became U+FFFD."""

    n_bytes: int = 0
    names: list[str] = field(default_factory=list)


class Walk:
    """Reads ``indices`` of ``sources`` in order; ``digests`` fills with the SHA-256 of each file's stored bytes.

    ``n_bytes`` is how much of what is stored was read so far, ``byte_order_marks`` how many long documents began
    with one; what workers find in their sections they count themselves.
    """

    def __init__(
        self,
        sources: Sequence[SourceFile],
        indices: Iterable[int],
        settings: PrepSettings,
        chunk_bytes: int,
        drops: Drops,
        cut: Cut | None = None,
    ) -> None:
        self.n_bytes = 0
        self.byte_order_marks = 0
        self.replaced = Replaced()
        self.digests: dict[int, str] = {}
        self._sources, self._indices, self._settings = sources, indices, settings
        self._chunk_bytes, self._drops, self._cut = chunk_bytes, drops, cut
        self._digest: Any = None

    def sections(self) -> Iterator[tuple[Section, bytes]]:
        """Yield sections with their bytes.

        Raises:
            CorpusError: a file cannot be read, is damaged, not text, or changed since it was planned.
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
                raise CorpusError(f"{source.path} changed while it was read; prepare it anew when it is at rest")
            refuse_changed(source)
            self.digests[index] = self._digest.hexdigest()

    def _seen(self, content: memoryview) -> None:
        self._digest.update(content)
        self.n_bytes += len(content)

    def _rows(self, index: int, path: str) -> Iterator[tuple[Section, bytes]]:
        """A column is read from here and there in the file, so its bytes are hashed in a reading of their own."""
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
                yield from self._long(index, row, [content])

    def _whole(self, index: int, file: BinaryIO) -> Iterator[tuple[Section, bytes]]:
        content = _read_full(file, SEGMENT_BYTES + 1)
        if len(content) <= SEGMENT_BYTES:
            yield Section(FILE, index, 0, 0, len(content)), content
        else:
            rest = iter(lambda: file.read(SEGMENT_BYTES), b"")
            stored = self._sources[index].n_bytes
            n_stored = None if stored is None else stored - len(_MARK) * content.startswith(_MARK)
            yield from self._long(index, 0, self._checked(index, 0, chain([content], rest), 0), n_stored)

    def _lines(self, index: int, file: BinaryIO, kind: str) -> Iterator[tuple[Section, bytes]]:
        held = bytearray()
        record, offset = 1, 0  # of the line that ``held`` begins with
        while block := _read_full(file, self._chunk_bytes):
            n_before = len(held)
            held += block
            end = held.rfind(b"\n", n_before) + 1
            if end:
                yield Section(kind, index, record, offset, end), bytes(held[:end])
                record += held.count(b"\n", 0, end)
                offset += end
                del held[:end]
            elif kind == LINES and len(held) > SEGMENT_BYTES:
                line = _Line(bytes(held), file)
                blocks = self._checked(index, record, line, offset)
                yield from self._long(index, record, blocks)
                record, offset, held = record + 1, offset + line.n_bytes, bytearray(line.rest)
            elif len(held) > LONGEST_JSON_LINE_BYTES:
                raise CorpusError(
                    f"{self._sources[index].path}:{record}: a line of more than {LONGEST_JSON_LINE_BYTES >> 20} MiB; "
                    "JSON is read a whole line at a time: save so long a text as a .txt file"
                )
        if held:
            yield Section(kind, index, record, offset, len(held)), bytes(held)

    def _checked(self, index: int, record: int, blocks: Iterable[bytes], offset: int) -> Iterator[bytes]:
        """Yield the bytes as valid UTF-8, broken between characters; ``offset`` is where they begin in their file."""
        path = self._sources[index].path
        decoder = codecs.getincrementaldecoder("utf-8")(self._settings.errors)
        for block in chain(filter(None, blocks), [b""]):
            content = decoder.getstate()[0] + block
            if offset == 0 and content.startswith(_MARK):
                self.byte_order_marks += 1
                decoder.reset()
                block = content = content[len(_MARK) :]
                offset = len(_MARK)
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
            if valid:
                yield valid

    def _long(
        self, index: int, record: int, blocks: Iterable[bytes], n_stored: int | None = None
    ) -> Iterator[tuple[Section, bytes]]:
        """Yield a document that takes several segments, or, where the corpus is cut, both halves of it.

        ``n_stored``: its length, where that of the cut is not known.
        """
        cut = self._cut
        if cut is None or (cut.source, cut.record) != (index, record):
            yield from _document(index, record, blocks, 0)
            return
        n_bytes = n_stored if cut.n_bytes is None else cut.n_bytes
        assert n_bytes is not None, "only a whole file is cut before its length is known"
        for half in cut_blocks(blocks, n_bytes, self._settings.val_split):
            yield from _document(index, record, half, HALF)


def _document(index: int, record: int, blocks: Iterable[bytes], half: int) -> Iterator[tuple[Section, bytes]]:
    """Yield the segments of one document that comes in blocks."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    flags, offset = BEGINS | half, 0
    for content, is_last in cut_stream(blocks):
        digest.update(content)
        flags |= ENDS if is_last else 0
        hashed = digest.hexdigest() if is_last else ""
        yield Section(TEXT, index, record, offset, len(content), flags, hashed), content
        offset += len(content)
        flags = half


class _Line:
    """The bytes of one long line, without its end; ``rest`` is what was read beyond it, ``n_bytes`` the whole."""

    def __init__(self, begin: bytes, file: BinaryIO) -> None:
        self._begin, self._file = begin, file
        self.rest = b""
        self.n_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        held = self._begin
        while True:
            # A return that ends what was read so far may belong to the newline that comes next.
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
    """Read as much, or to the end: a pipe and a decompressor give less at a time."""
    content = b""
    while len(content) < n_bytes and (block := file.read(n_bytes - len(content))):
        content += block
    return content

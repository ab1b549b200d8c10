"""Chunks of a corpus, as sent to a worker: sections of bytes and the names of their sources."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

# Kinds of sections: a whole text file; a document or segment that is known to be UTF-8; lines of text; lines of JSON.
FILE, TEXT, LINES, JSON_LINES = "file", "text", "lines", "jsonl"
# Flags of a TEXT section and of its unit of tokens: a document begins in it; ends in it; it is not blank; the document
# is one half of the single document of a corpus, to which filters do not apply.
BEGINS, ENDS, HAS_TEXT, HALF = 1, 2, 4, 8
WHOLE = BEGINS | ENDS

SMALLEST_CHUNK_BYTES = 1 << 18
LARGEST_CHUNK_BYTES = 1 << 22
_CHUNKS_WANTED = 256


def chunk_bytes_for(corpus_bytes: int | None) -> int:
    """Return the size of chunks: small enough to keep every core busy, large enough to limit the number of files."""
    if corpus_bytes is None:
        return LARGEST_CHUNK_BYTES
    return min(LARGEST_CHUNK_BYTES, max(SMALLEST_CHUNK_BYTES, corpus_bytes // _CHUNKS_WANTED))


class Section(NamedTuple):
    """Consecutive bytes of one source in the payload of a chunk.

    ``record``: line or row of its first document, from 1; 0 for a whole file. ``offset``: its position in the file, or,
    for a segment, in the document. ``digest``: hash of the whole document, in its last segment. ``at``: position of the
    bytes in the unpacked file, -1 where they are not in it as such. ``check``: their CRC-32 where the payload does not
    hold them and the worker reads them from the file, else -1.
    """

    kind: str
    source: int
    record: int
    offset: int
    n_bytes: int
    flags: int = WHOLE
    digest: str = ""
    at: int = -1
    check: int = -1

    @property
    def is_in_file(self) -> bool:
        """Whether the worker reads the bytes from the file of their source."""
        return self.check >= 0


@dataclass(frozen=True)
class Chunk:
    """Sections in reading order, the names of their sources, and the bytes of sections that are not read from files.

    ``former``: SHA-256 of the bytes that an earlier run encoded, where only the worker can compare them.
    """

    index: int
    sections: tuple[Section, ...]
    names: dict[int, str]
    payload: bytes | memoryview
    former: str = ""

    @property
    def n_bytes(self) -> int:
        """Bytes of all sections."""
        return sum(section.n_bytes for section in self.sections)

    @property
    def is_whole(self) -> bool:
        """Whether the payload holds the bytes of every section."""
        return not any(section.is_in_file for section in self.sections)

    def header(self) -> bytes:
        """Return everything except the payload as bytes, for :meth:`from_message`."""
        names = {str(source): name for source, name in self.names.items()}
        return json.dumps([self.index, self.sections, names]).encode("utf-8")

    @classmethod
    def from_message(cls, header: bytes, payload: bytes | memoryview) -> Chunk:
        """Return the chunk with this header and payload."""
        index, sections, names = json.loads(header)
        return cls(
            index,
            tuple(Section(*section) for section in sections),
            {int(source): name for source, name in names.items()},
            payload,
        )

    def contents(self) -> Iterator[tuple[Section, memoryview]]:
        """Yield each section of a whole chunk and its bytes."""
        view = memoryview(self.payload)
        at = 0
        for section in self.sections:
            yield section, view[at : at + section.n_bytes]
            at += section.n_bytes


def gather(sections: Iterable[tuple[Section, bytes]], names: list[str], chunk_bytes: int) -> Iterator[Chunk]:
    """Group sections into chunks of at least ``chunk_bytes``; the last chunk may be smaller."""
    held: list[tuple[Section, bytes]] = []
    n_bytes = index = 0
    for section, content in sections:
        held.append((section, content))
        n_bytes += section.n_bytes
        if n_bytes >= chunk_bytes:
            yield _joined(index, held, names)
            held, n_bytes, index = [], 0, index + 1
    if held:
        yield _joined(index, held, names)


def _joined(index: int, held: list[tuple[Section, bytes]], names: list[str]) -> Chunk:
    sections = tuple(section for section, _ in held)
    used = {section.source: names[section.source] for section in sections}
    return Chunk(index, sections, used, held[0][1] if len(held) == 1 else b"".join(content for _, content in held))

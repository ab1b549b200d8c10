"""What is handed to a worker: sections of a corpus as bytes, and what is needed to make documents of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

# What a section holds: a whole file of text; text that is known to be UTF-8, whole or a part of a document; lines of
# text; lines of JSON.
FILE, TEXT, LINES, JSON_LINES = "file", "text", "lines", "jsonl"
# Of a section of text, and of the unit of tokens it becomes: a document begins in it, ends in it, is not all blank; the
# document is one half of a corpus that was a single document, and is kept as it is.
BEGINS, ENDS, HAS_TEXT, HALF = 1, 2, 4, 8
WHOLE = BEGINS | ENDS

SMALLEST_CHUNK_BYTES = 1 << 18
LARGEST_CHUNK_BYTES = 1 << 22
_CHUNKS_WANTED = 256


def chunk_bytes_for(corpus_bytes: int | None) -> int:
    """Return how large chunks are: enough of them to keep every core busy to the end, and not a million files."""
    if corpus_bytes is None:
        return LARGEST_CHUNK_BYTES
    return min(LARGEST_CHUNK_BYTES, max(SMALLEST_CHUNK_BYTES, corpus_bytes // _CHUNKS_WANTED))


class Section(NamedTuple):
    """``n_bytes`` of a chunk's payload.

    ``record``: line or row of its first document, from 1; 0 for a whole file. ``offset``: where it begins in its file,
    or, for a part of a document, in that document. ``digest``: of the part that ends a document, the hash of it all.
    """

    kind: str
    source: int
    record: int
    offset: int
    n_bytes: int
    flags: int = WHOLE
    digest: str = ""


@dataclass(frozen=True)
class Chunk:
    """Sections in reading order, and the names of the sources they are from."""

    index: int
    sections: tuple[Section, ...]
    names: dict[int, str]
    payload: bytes

    def header(self) -> bytes:
        """Return everything but the payload, for :meth:`from_message`."""
        names = {str(source): name for source, name in self.names.items()}
        return json.dumps([self.index, self.sections, names]).encode("utf-8")

    @classmethod
    def from_message(cls, header: bytes, payload: bytes) -> Chunk:
        """Return the chunk that was sent as these two."""
        index, sections, names = json.loads(header)
        return cls(
            index,
            tuple(Section(*section) for section in sections),
            {int(source): name for source, name in names.items()},
            payload,
        )

    def contents(self) -> Iterator[tuple[Section, memoryview]]:
        """Yield each section with its bytes."""
        view = memoryview(self.payload)
        at = 0
        for section in self.sections:
            yield section, view[at : at + section.n_bytes]
            at += section.n_bytes


def gather(sections: Iterable[tuple[Section, bytes]], names: list[str], chunk_bytes: int) -> Iterator[Chunk]:
    """Put sections together to chunks of at least ``chunk_bytes``, but for the last."""
    held: list[tuple[Section, bytes]] = []
    n_bytes = index = 0
    for section, content in sections:
        held.append((section, content))
        n_bytes += len(content)
        if n_bytes >= chunk_bytes:
            yield _joined(index, held, names)
            held, n_bytes, index = [], 0, index + 1
    if held:
        yield _joined(index, held, names)


def _joined(index: int, held: list[tuple[Section, bytes]], names: list[str]) -> Chunk:
    sections = tuple(section for section, _ in held)
    used = {section.source: names[section.source] for section in sections}
    return Chunk(index, sections, used, b"".join(content for _, content in held))

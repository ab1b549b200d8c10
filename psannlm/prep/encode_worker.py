"""Worker process of ``prep``: decodes, parses, filters, hashes and tokenizes one chunk at a time, in one thread."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psannlm.data.corpus.documents import json_text, without_surrogates
from psannlm.data.corpus.reading import decoded, replaced
from psannlm.data.framing import HASH_BYTES, frame, pack_origin, text_hash, unpack_origin
from psannlm.data.memory_store import token_dtype
from psannlm.data.split import SEGMENT_BYTES, cut_segments, find_cut
from psannlm.errors import CorpusError, PsannlmError, StorageError, TokenizerError
from psannlm.prep.chunks import BEGINS, ENDS, FILE, HALF, HAS_TEXT, JSON_LINES, TEXT, WHOLE, Chunk, Section
from psannlm.prep.encoded_chunk import UNIT, EncodedChunk, encoded_chunk_parts, encoded_chunk_path, write_encoded_chunk
from psannlm.prep.job import REPLACE_ADVICE, REPLACE_OPTION, PrepSettings
from psannlm.prep.reader import Cut
from psannlm.runtime.malloc import trim_aggressively
from psannlm.runtime.processes import end_with
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import tokenizer_from_bytes
from psannlm.tokenizers.roundtrip import RoundTripMeter

# Tokenizer libraries use about 100 bytes per token while they encode: groups are small, and results are arrays.
_GROUP_BYTES = 1 << 18
_NAMES_KEPT = 5
# The first unit of a chunk, and one in 64 of the others, is checked for its round trip.
_CHECKED_ONE_IN = 64
_DRAWN_CHARACTERS = 64
_NO_HASH = bytes(HASH_BYTES)
# Environment of a worker: it encodes with one thread.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Columns of a unit: tokens (0 until it is encoded), bytes, characters, flags, origin, hash.
Row = tuple[int, int, int, int, int, bytes]


@dataclass
class Facts:
    """Counts and examples of one chunk; records are (source, record). The names are keys in encoded chunks on disk."""

    drops: dict[str, list[Any]] = field(default_factory=dict)
    byte_order_marks: int = 0
    replaced_bytes: int = 0
    replaced_surrogates: int = 0
    replaced_in: list[tuple[int, int]] = field(default_factory=list)
    lost: list[tuple[int, int, str]] = field(default_factory=list)
    checked_bytes: int = 0
    lost_bytes: int = 0

    def drop(self, reason: str, source: int, record: int) -> None:
        """Count an omitted record, and keep the first few as examples."""
        entry = self.drops.setdefault(reason, [0, []])
        entry[0] += 1
        if len(entry[1]) < _NAMES_KEPT:
            entry[1].append((source, record))


def too_short(settings: PrepSettings) -> str:
    """Return the reason for which short documents are left out."""
    return f"fewer than {settings.min_chars:,} characters"


def too_long(settings: PrepSettings) -> str:
    """Return the reason for which long documents are left out."""
    return f"more than {settings.max_chars:,} characters"


class ChunkEncoder:
    """Encodes chunks; a pure function of the chunk, in every process."""

    def __init__(self, tokenizer: Tokenizer, settings: PrepSettings, cut_at: Cut | None = None) -> None:
        self._tokenizer, self._settings, self._cut = tokenizer, settings, cut_at
        self._dtype = token_dtype(tokenizer.vocab_size)

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Return a chunk's units and tokens.

        Raises:
            CorpusError: a section is not UTF-8, or a line is not a valid record; names file and position.
        """
        facts = Facts()
        rows: list[Row] = []
        arrays: list[NDArray[Any]] = [np.zeros(0, self._dtype)]
        group: list[str] = []
        group_bytes = 0
        meter = RoundTripMeter()
        for text, row in self._units(chunk, facts):
            is_checked = not rows or zlib.crc32(text[:_DRAWN_CHARACTERS].encode("utf-8")) % _CHECKED_ONE_IN == 0
            roundtrip_error = meter.check(self._tokenizer, text) if is_checked else None
            if roundtrip_error is not None and not facts.lost:
                facts.lost.append((*unpack_origin(row[4]), roundtrip_error))
            group.append(text)
            rows.append(row)
            group_bytes += row[1]
            if group_bytes >= _GROUP_BYTES:
                arrays.append(self._framed(group, rows))
                group, group_bytes = [], 0
        if group:
            arrays.append(self._framed(group, rows))
        facts.checked_bytes, facts.lost_bytes = meter.checked_bytes, meter.lost_bytes
        payload = hashlib.sha256(chunk.payload).hexdigest()
        return EncodedChunk(_table(rows), np.concatenate(arrays), payload, vars(facts))

    def _framed(self, texts: list[str], rows: list[Row]) -> NDArray[Any]:
        """Encode and frame ``texts``, the units of the last ``rows``, and set the lengths of those rows."""
        ids, lengths = self._tokenizer.encode_flat(texts, threads=1)
        ours = rows[-len(texts) :]
        flags = np.fromiter((row[3] for row in ours), np.uint8, len(ours))
        begins, ends = (flags & BEGINS) > 0, (flags & ENDS) > 0
        tokens, framed = frame(
            ids,
            lengths,
            bos_id=self._tokenizer.bos_id,
            eos_id=self._tokenizer.eos_id,
            dtype=self._dtype,
            begins=begins,
            ends=ends,
        )
        rows[-len(texts) :] = [(n, *row[1:]) for n, row in zip(framed.tolist(), ours, strict=True)]
        return tokens

    def _units(self, chunk: Chunk, facts: Facts) -> Iterator[tuple[str, Row]]:
        """Yield the text and the row of each unit."""
        for section, content in chunk.contents():
            name = chunk.names[section.source]
            if section.kind == TEXT:
                text = str(content, "utf-8")
                if section.flags == WHOLE:
                    yield from self._document(text, section.source, section.record, name, facts)
                else:
                    yield _unit(text, section.n_bytes, section.flags, section, bytes.fromhex(section.digest))
            elif section.kind == FILE:
                text = self._decoded(content, section, name, facts)
                yield from self._document(text, section.source, section.record, name, facts)
            else:
                for record, line in self._lines(content, section, name, facts):
                    text = line
                    if section.kind == JSON_LINES:
                        text = self._json(line, section.source, record, name, facts)
                    yield from self._document(text, section.source, record, name, facts)

    def _json(self, line: str, source: int, record: int, name: str, facts: Facts) -> str:
        where = f"{name}:{record}"
        text = json_text(line, self._settings.text_key, where)
        text, n_surrogates = without_surrogates(text, self._settings.errors, where, REPLACE_OPTION)
        if n_surrogates:
            facts.replaced_surrogates += n_surrogates
            if len(facts.replaced_in) <= _NAMES_KEPT:
                facts.replaced_in.append((source, record))
        return text

    def _lines(self, content: memoryview, section: Section, name: str, facts: Facts) -> Iterator[tuple[int, str]]:
        """Yield (line number, text without its end) of the lines that are not blank; only \\n ends a line."""
        text = self._decoded(content, section, name, facts)
        lines = text.split("\n")
        if not lines[-1]:
            del lines[-1]
        for record, line in enumerate(lines, start=section.record):
            line = line.removesuffix("\r")
            if not line or line.isspace():
                facts.drop("blank line", section.source, record)
            else:
                yield record, line

    def _decoded(self, content: memoryview, section: Section, name: str, facts: Facts) -> str:
        whole = bytes(content)
        if self._settings.errors == "strict":
            text, has_mark = decoded(whole, name, section.offset, REPLACE_ADVICE)
        else:
            text = whole.decode("utf-8", "replace")
            if n_bytes := replaced(whole, text):
                facts.replaced_bytes += n_bytes
                record = section.record + (0 if section.kind == FILE else _lines_before_damage(whole))
                facts.replaced_in.append((section.source, record))
            has_mark = section.offset == 0 and text.startswith("\ufeff")
            text = text[has_mark:]
        facts.byte_order_marks += has_mark
        return text

    def _document(self, text: str, source: int, record: int, name: str, facts: Facts) -> Iterator[tuple[str, Row]]:
        settings = self._settings
        if not text or text.isspace():
            facts.drop("blank document", source, record)
        elif len(text) < settings.min_chars:
            facts.drop(too_short(settings), source, record)
        elif settings.max_chars is not None and len(text) > settings.max_chars:
            facts.drop(too_long(settings), source, record)
        else:
            content = text.encode("utf-8")
            where = Section(TEXT, source, record, 0, len(content))
            if self._cut is not None and (self._cut.source, self._cut.record) == (source, record):
                at = find_cut(content, settings.val_split)
                yield from _segments(content[:at], None, where, HALF)
                yield from _segments(content[at:], None, where, HALF)
            else:
                yield from _segments(content, text, where)


def _segments(content: bytes, text: str | None, where: Section, half: int = 0) -> Iterator[tuple[str, Row]]:
    """Yield the units of a whole document; ``text`` is the decoded ``content``, if available."""
    digest = text_hash(content)
    if len(content) <= SEGMENT_BYTES:
        yield _unit(text if text is not None else content.decode("utf-8"), len(content), WHOLE | half, where, digest)
        return
    parts = cut_segments(content)
    for number, part in enumerate(parts, start=1):
        flags = (BEGINS if number == 1 else 0) | (ENDS if number == len(parts) else 0) | half
        yield _unit(part.decode("utf-8"), len(part), flags, where, digest if flags & ENDS else b"")


def _unit(text: str, n_bytes: int, flags: int, where: Section, digest: bytes) -> tuple[str, Row]:
    if text and not text.isspace():
        flags |= HAS_TEXT
    return text, (0, n_bytes, len(text), flags, pack_origin(where.source, where.record), digest or _NO_HASH)


def _lines_before_damage(content: bytes) -> int:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return content.count(b"\n", 0, error.start)
    return 0


def _table(rows: list[Row]) -> NDArray[Any]:
    table = np.zeros(len(rows), UNIT)
    if rows:
        n_tokens, n_bytes, n_chars, flags, origins, hashes = zip(*rows, strict=True)
        for name, column in (("n_tokens", n_tokens), ("n_bytes", n_bytes), ("n_chars", n_chars), ("flags", flags)):
            table[name] = column
        table["origin"] = origins
        table["hash"] = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, HASH_BYTES)
    return table


# Errors that a worker may report; sent by name, because the connection carries JSON and not pickled objects.
ERRORS: dict[str, type[PsannlmError]] = {kind.__name__: kind for kind in (CorpusError, StorageError, TokenizerError)}


def setup_message(folder: Path, settings: PrepSettings, cut: Cut | None) -> bytes:
    """Return the first message to a worker; the second is the tokenizer file."""
    return json.dumps(
        {"folder": str(folder), "settings": settings.as_dict(), "cut": None if cut is None else vars(cut)}
    ).encode("utf-8")


def encoder_of(setup: bytes, tokenizer: bytes) -> ChunkEncoder:
    """Return the encoder that the first two messages to a worker describe."""
    message = json.loads(setup)
    cut = None if message["cut"] is None else Cut(**message["cut"])
    return ChunkEncoder(tokenizer_from_bytes(tokenizer), PrepSettings(**message["settings"]), cut)


def main() -> None:
    """Encode chunks until the connection ends; ``sys.argv``: its file descriptor and the parent's process id."""
    handle, parent = int(sys.argv[1]), int(sys.argv[2])
    _end_when_gone(parent)
    trim_aggressively()
    with Connection(handle) as connection:
        try:
            setup = connection.recv_bytes()
            encoder = encoder_of(setup, connection.recv_bytes())
            folder = Path(json.loads(setup)["folder"])
            while True:
                chunk = Chunk.from_message(connection.recv_bytes(), connection.recv_bytes())
                connection.send_bytes(json.dumps(_answer(encoder, chunk, folder)).encode("utf-8"))
        except (EOFError, ConnectionError):
            return


def _answer(encoder: ChunkEncoder, chunk: Chunk, folder: Path) -> dict[str, Any]:
    try:
        encoded = encoder.encode(chunk)
        n_bytes = write_encoded_chunk(encoded_chunk_path(folder, chunk.index), *encoded_chunk_parts(encoded))
    except tuple(ERRORS.values()) as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"tokens": len(encoded.tokens), "bytes": n_bytes}


def _end_when_gone(parent: int) -> None:
    """Exit when the parent exits for any reason: a worker must not write into a folder without a lock."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent, signal.SIGKILL)

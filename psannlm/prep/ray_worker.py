"""Ray tasks of ``prep``: one encodes a chunk on any node of a cluster, one divides files into sections there.

The first gets bytes and returns bytes, and needs no common disk. Where the nodes see the files of the corpus, the
second reads them, and the first gets positions in them instead of bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psannlm import __version__
from psannlm.data.corpus.files import file_stamp
from psannlm.data.corpus.reading import read_range
from psannlm.errors import CorpusError, PsannlmError
from psannlm.io.code_identity import sources_sha256
from psannlm.prep.chunks import Chunk, Section
from psannlm.prep.encode_worker import ERRORS, ONE_THREAD, ChunkEncoder, encoder_of
from psannlm.prep.encoded_chunk import encoded_chunk_parts
from psannlm.prep.job import PrepSettings
from psannlm.prep.reader import CorpusReader, Cut, Drops, SourceFile, refuse_changed
from psannlm.runtime.malloc import trim_aggressively

# Libraries that decide the ids of a text, and psannlm's packages that decide the rest of an encoded chunk.
_LIBRARIES = ("sentencepiece", "tokenizers")
_SOURCES = ("data", "prep", "tokenizers")
_DIGITS = 12
# A block of sections that are read again from their files: positions alone, so that they are found far ahead.
_BLOCK_BYTES = 1 << 26
_BLOCK_SECTIONS = 4096

# The encoder of the preparation that this process works for, by its key: one, since a tokenizer takes memory.
_encoders: dict[str, ChunkEncoder] = {}


def versions() -> dict[str, str]:
    """Return the versions of all that decides the bytes of an encoded chunk, by name."""
    libraries = {name: version(name) for name in _LIBRARIES}
    return {"psannlm": __version__, "code of psannlm": sources_sha256(_SOURCES)[:_DIGITS], **libraries}


def differing_versions(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """Return the versions of a worker that differ from ours, for an error message; empty if none does."""
    return ", ".join(
        f"{name} {theirs.get(name, 'missing')} instead of {ours[name]}"
        for name in ours
        if theirs.get(name) != ours[name]
    )


def version_reporter() -> Callable[[], dict[str, Any]]:
    """Return a function that reports the versions of the node it is run on, also where psannlm is not installed.

    Ray sends functions that a module holds by their names, but this one by its code.
    """

    def report() -> dict[str, Any]:
        import importlib
        import platform

        try:
            worker = importlib.import_module("psannlm.prep.ray_worker")
        except ImportError as error:
            return {"host": platform.node(), "missing": str(error)}
        return {"host": platform.node(), "versions": worker.versions()}

    return report


def differing_file(files: Sequence[SourceFile]) -> tuple[str, str]:
    """Return the name of this machine, and the first file that it does not see as described; empty if there is none."""
    for file in files:
        try:
            n_bytes, stamp = file_stamp(file.path)
            read_range(file.path, 0, 1)
        except CorpusError as error:
            return platform.node(), str(error)
        if n_bytes != file.n_bytes:
            return platform.node(), f"{file.path} has {n_bytes:,} bytes there, not {file.n_bytes:,}"
        if stamp != file.stamp:
            return platform.node(), f"{file.path} has another modification time or version there"
    return platform.node(), ""


def encode_on_ray(
    key: str,
    job: list[Any],
    header: bytes,
    payload: NDArray[np.uint8],
    files: Mapping[int, SourceFile] | None = None,
    former: str = "",
) -> tuple[dict[str, Any], Any]:
    """Encode the chunk of ``header`` and ``payload``; return its figures and the content of its file.

    Args:
        key: identifies the preparation.
        job: a list that holds the reference to its (setup, tokenizer, versions), which is fetched once per process.
        files: sources of the sections that are read here, by their index.
        former: SHA-256 of bytes that are encoded already: only compare the chunk with it.

    Returns:
        ``tokens`` and (n_bytes,) uint8. The array is None where the chunk has an ``error``, was only compared
        (``is_former``), or where this node has other ``versions``.
    """
    encoder = _encoders.get(key)
    if encoder is None:
        # The libraries read these when they first encode.
        os.environ.update(ONE_THREAD)
        trim_aggressively()
        setup, tokenizer, expected = import_module("ray").get(job[0])
        # A node may have joined the cluster since the versions of all nodes were compared.
        if differing := differing_versions(versions(), expected):
            return {"versions": differing, "host": platform.node()}, None
        _encoders.clear()
        encoder = _encoders[key] = encoder_of(setup, tokenizer)
    try:
        chunk = Chunk.from_message(header, payload.data)
        if files:
            chunk = with_bytes_of_files(chunk, files)
        if former:
            return {"is_former": hashlib.sha256(chunk.payload).hexdigest() == former}, None
        encoded = encoder.encode(chunk)
    except tuple(ERRORS.values()) as error:
        return _answer_of(error, at_node=bool(files)), None
    content = b"".join(encoded_chunk_parts(encoded))
    return {"tokens": len(encoded.tokens)}, np.frombuffer(content, np.uint8)


def _answer_of(error: Exception, at_node: bool) -> dict[str, Any]:
    where = f" (read on the Ray node {platform.node()})" if at_node else ""
    return {"error": type(error).__name__, "message": f"{error}{where}"}


def with_bytes_of_files(chunk: Chunk, files: Mapping[int, SourceFile]) -> Chunk:
    """Return the chunk with the bytes of all sections in its payload; adjacent ones are read at once.

    Raises:
        CorpusError: a file cannot be read, or differs from the one in which the sections were found.
    """
    for file in files.values():
        refuse_changed(file)
    parts: list[bytes | memoryview] = []
    n_sent = 0
    held, held_source, held_at = b"", -1, 0
    sent = memoryview(chunk.payload)
    for number, section in enumerate(chunk.sections):
        if not section.is_in_file:
            parts.append(sent[n_sent : n_sent + section.n_bytes])
            n_sent += section.n_bytes
            continue
        end = section.at + section.n_bytes
        if section.source != held_source or not held_at <= section.at or end > held_at + len(held):
            held_source, held_at = section.source, section.at
            held = read_range(files[held_source].path, held_at, _adjacent_bytes(chunk.sections[number:]))
        content = held[section.at - held_at : end - held_at]
        if len(content) != section.n_bytes or zlib.crc32(content) != section.check:
            raise CorpusError(
                f"{files[section.source].path}: bytes {section.at:,} to {end:,} differ from those on the node that "
                "divided the corpus into chunks; let every node read the same files"
            )
        parts.append(content)
    return replace(chunk, payload=b"".join(parts))


def _adjacent_bytes(sections: Sequence[Section]) -> int:
    """Return how many bytes of the file of the first section follow each other in ``sections``."""
    first, end = sections[0], sections[0].at
    for section in sections:
        if not section.is_in_file or (section.source, section.at) != (first.source, end):
            break
        end += section.n_bytes
    return end - first.at


def scan_on_ray(
    job: list[Any], files: Mapping[int, SourceFile], chunk_bytes: int, smallest_bytes: int, n_known: int
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Read sources on a node: yield their sections in blocks, and the bytes that are not read again from the files.

    Those are sections of fewer than ``smallest_bytes`` bytes, and all of files that are compressed, of Parquet files,
    and of damaged text. The others get their CRC-32. Blocks depend on the files alone: another attempt leaves out the
    ``n_known`` blocks that arrived.

    Yields:
        ``sections`` with the state of the reader after them, and (n_bytes,) uint8; or an ``error``, or other
        ``versions`` of this node.
    """
    setup, _, expected = import_module("ray").get(job[0])
    if differing := differing_versions(versions(), expected):
        yield {"versions": differing, "host": platform.node()}, None
        return
    trim_aggressively()
    message = json.loads(setup)
    settings, cut = PrepSettings(**message["settings"]), None if message["cut"] is None else Cut(**message["cut"])
    drops = Drops()
    reader = CorpusReader(files, list(files), settings, chunk_bytes, drops, cut)
    error: PsannlmError | None = None
    plain: set[int] = set()

    def sections() -> Iterator[tuple[Section, bytes]]:
        nonlocal error
        try:
            plain.update(plain_files(files, smallest_bytes))
            yield from reader.sections()
        except tuple(ERRORS.values()) as raised:
            error = raised

    blocks = find_blocks(sections(), plain, chunk_bytes, smallest_bytes)
    for found, content in islice(blocks, n_known, None):
        yield {"sections": found, "reader": _state(reader, drops)}, np.frombuffer(content, np.uint8)
    if error is not None:
        yield _answer_of(error, at_node=True), None
    else:
        yield {"sections": [], "reader": _state(reader, drops)}, np.zeros(0, np.uint8)


def _state(reader: CorpusReader, drops: Drops) -> dict[str, Any]:
    return {
        "n_bytes": reader.n_bytes,
        "byte_order_marks": reader.byte_order_marks,
        "replaced": (reader.replaced.n_bytes, list(reader.replaced.names)),
        "digests": dict(reader.digests),
        "drops": [(reason, count, drops.examples[reason]) for reason, count in drops.counts.items()],
    }


def plain_files(files: Mapping[int, SourceFile], smallest_bytes: int) -> set[int]:
    """Return the files that can be read by position: not compressed, and of ``smallest_bytes`` or more."""
    return {index for index, file in files.items() if (file.n_bytes or 0) >= smallest_bytes and not file.is_compressed}


def find_blocks(
    sections: Iterable[tuple[Section, bytes]], plain: Container[int], chunk_bytes: int, smallest_bytes: int
) -> Iterator[tuple[list[tuple[Any, ...]], bytes]]:
    """Yield sections as tuples, and the bytes of those that are sent: of files that are not ``plain``, and small ones.

    ``plain`` is first looked at when the first section is there.
    """
    found: list[tuple[Any, ...]] = []
    parts: list[bytes] = []
    n_read = n_sent = 0
    for section, content in sections:
        n_read += len(content)
        if section.at >= 0 and section.n_bytes >= smallest_bytes and section.source in plain:
            found.append(tuple(section._replace(check=zlib.crc32(content))))
        else:
            found.append(tuple(section))
            parts.append(content)
            n_sent += len(content)
        if n_sent >= chunk_bytes or n_read >= _BLOCK_BYTES or len(found) >= _BLOCK_SECTIONS:
            yield found, b"".join(parts)
            found, parts, n_read, n_sent = [], [], 0, 0
    if found:
        yield found, b"".join(parts)

"""Shard files: tokens and records of documents, written in one pass, opened at once, and verified block by block.

A shard is a safetensors file of eight tensors. Per document: ``starts`` (n_documents + 1,) I64, its start in the
stream; ``n_bytes`` (n_documents,) I64, UTF-8 bytes of its text; ``origins`` (n_documents,) I64, source and record;
``hashes`` (n_documents, 16) U8. Then ``tokens`` (n_tokens,) U16 or U32, the framed stream; ``lengths`` and
``length_counts`` (n_lengths,) I64, the distinct lengths of documents with BOS and EOS, and the number of each; and last
``block_sha256`` (n_blocks, 32) U8, the SHA-256 of each block of all bytes before it, header included. Wide types are
first, so that mapped arrays are aligned.

Hashing 10 GB would make opening slow. Therefore the manifest has one hash of the header and the block sums, which is
checked at once, and each block is checked against its sum when it is first read.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray
from pydantic import ConfigDict, Field

from psannlm.data.framing import HASH_BYTES, DocumentBatch
from psannlm.data.mapping import map_bytes
from psannlm.errors import ArtifactError
from psannlm.io.atomic import is_plain_file, replacing
from psannlm.io.lfs_pointers import refuse_pointer
from psannlm.io.safetensors_header import build_header, parse_header, parse_metadata, read_header, refuse_wrong_length

FORMAT = "psannlm-shard-1"
# The smallest of 64 KiB to 1 MiB: random windows of a cold file are fastest, and sums take only 0.05 % of the file.
BLOCK_BYTES = 1 << 16
TOKEN_TYPES = {"uint16": "U16", "uint32": "U32"}
_SUM_BYTES = 32
# Strict, because pydantic would otherwise take "3", 3.0 and True for whole numbers.
Count = Annotated[int, Field(strict=True, ge=0)]
# A fixed size: the header is written last, when the number of distinct lengths is known.
_HEADER_BYTES = 2048
RESTORE_ADVICE = "Restore it from a copy, or run psannlm prep again"


@dataclass(frozen=True)
class ShardEntry:
    """The manifest entry of a shard.

    ``tokens``: including BOS and EOS; ``text_bytes``: UTF-8 bytes of all texts; ``file_bytes``: size of the file.
    ``header_and_sums_sha256``: hash of the header followed by the block sums, which verify the rest of the file.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    file: str
    tokens: Count
    documents: Count
    text_bytes: Count
    file_bytes: Count
    header_and_sums_sha256: str


class _Layout:
    """Position of each tensor of a shard: a pure function of its sizes, so that no header has to be trusted."""

    def __init__(self, token_type: str, fingerprint: str, n_tokens: int, n_documents: int, n_lengths: int) -> None:
        self.fingerprint = fingerprint
        self.starts = _HEADER_BYTES
        self.n_bytes = self.starts + 8 * (n_documents + 1)
        self.origins = self.n_bytes + 8 * n_documents
        self.hashes = self.origins + 8 * n_documents
        self.tokens = self.hashes + HASH_BYTES * n_documents
        self.lengths = self.tokens + (2 if token_type == "U16" else 4) * n_tokens
        self.length_counts = self.lengths + 8 * n_lengths
        self.sums = self.length_counts + 8 * n_lengths
        self.n_blocks = -(-self.sums // BLOCK_BYTES)
        self.size = self.sums + _SUM_BYTES * self.n_blocks
        self.header = build_header(
            {
                "starts": ("I64", (n_documents + 1,)),
                "n_bytes": ("I64", (n_documents,)),
                "origins": ("I64", (n_documents,)),
                "hashes": ("U8", (n_documents, HASH_BYTES)),
                "tokens": (token_type, (n_tokens,)),
                "lengths": ("I64", (n_lengths,)),
                "length_counts": ("I64", (n_lengths,)),
                "block_sha256": ("U8", (self.n_blocks, _SUM_BYTES)),
            },
            {"format": FORMAT, "tokenizer_fingerprint": fingerprint},
            n_bytes=_HEADER_BYTES,
        )


def write_shard(
    path: Path,
    *,
    dtype: DTypeLike,
    fingerprint: str,
    n_tokens: int,
    n_documents: int,
    batches: Iterable[DocumentBatch],
) -> ShardEntry:
    """Write the documents of ``batches`` to ``path`` atomically, and return the manifest entry of the file.

    ``n_tokens`` includes BOS and EOS. One batch is in memory at a time; equal content gives equal bytes.

    Raises:
        StorageError: the disk is full or the folder cannot be written; ``path`` keeps its former content.
        ValueError: the batches do not hold ``n_tokens`` and ``n_documents``, or contradict themselves.
    """
    path, dtype = Path(path), np.dtype(dtype)
    with replacing(path) as temporary, open(temporary, "w+b") as file:
        layout, text_bytes = _write_batches(file, fingerprint, dtype, n_tokens, n_documents, batches)
        file.seek(0)
        sums = b"".join(_block_sums(file, layout.sums))
        file.seek(layout.sums)
        file.write(sums)
    digest = hashlib.sha256(layout.header + sums).hexdigest()
    return ShardEntry(path.name, n_tokens, n_documents, text_bytes, layout.size, digest)


def _write_batches(
    file: BinaryIO,
    fingerprint: str,
    dtype: np.dtype[Any],
    n_tokens: int,
    n_documents: int,
    batches: Iterable[DocumentBatch],
) -> tuple[_Layout, int]:
    """Write everything but the block sums; return the layout, and the UTF-8 bytes of all texts."""
    document = token = ended = text_bytes = 0
    counts: Counter[int] = Counter()
    layout = _Layout(TOKEN_TYPES[dtype.name], fingerprint, n_tokens, n_documents, 0)
    _write_at(file, layout.starts, np.zeros(1, dtype="<i8"))
    for batch in batches:
        batch.check_arrays()
        if batch.tokens.dtype != dtype:
            raise ValueError(f"tokens are {batch.tokens.dtype}, the shard is {dtype}")
        if document + len(batch.lengths) > n_documents or token + len(batch.tokens) > n_tokens:
            raise ValueError(f"the batches hold more than {n_documents} documents or {n_tokens} tokens")
        ends = ended + np.cumsum(batch.lengths)
        ended = int(ends[-1]) if len(ends) else ended
        if ended > token + len(batch.tokens):
            raise ValueError(f"documents end at token {ended}, but there are only {token + len(batch.tokens)} tokens")
        _write_at(file, layout.starts + 8 * (document + 1), ends.astype("<i8"))
        _write_at(file, layout.n_bytes + 8 * document, batch.n_bytes.astype("<i8"))
        _write_at(file, layout.origins + 8 * document, batch.origins.astype("<i8"))
        _write_at(file, layout.hashes + HASH_BYTES * document, batch.hashes.astype("u1"))
        _write_at(file, layout.tokens + dtype.itemsize * token, batch.tokens.astype(dtype.newbyteorder("<")))
        document, token = document + len(batch.lengths), token + len(batch.tokens)
        text_bytes += int(batch.n_bytes.sum())
        for length, count in zip(*np.unique(batch.lengths, return_counts=True), strict=True):
            counts[int(length)] += int(count)
    if (document, token, ended) != (n_documents, n_tokens, n_tokens):
        raise ValueError(f"the batches do not hold {n_documents} documents and {n_tokens} tokens in total")
    # Small even in a large shard: k distinct lengths take at least k * (k + 1) / 2 tokens.
    table = np.array(sorted(counts.items()), dtype="<i8").reshape(-1, 2)
    layout = _Layout(TOKEN_TYPES[dtype.name], fingerprint, n_tokens, n_documents, len(table))
    _write_at(file, layout.lengths, table.T)
    file.seek(0)
    file.write(layout.header)
    return layout, text_bytes


def _write_at(file: BinaryIO, at: int, values: NDArray[Any]) -> None:
    file.seek(at)
    file.write(np.ascontiguousarray(values).data)


def _block_sums(file: BinaryIO, end: int) -> Iterable[bytes]:
    for start in range(0, end, BLOCK_BYTES):
        yield hashlib.sha256(file.read(min(BLOCK_BYTES, end - start))).digest()


def is_shard_of(entry: ShardEntry, size: int, read: Callable[[int, int], bytes]) -> bool:
    """Return whether a file has the size, the header and the block sums of a manifest ``entry``.

    Its blocks are not read: the sums verify them later. ``read(start, end)`` returns the bytes of a range of the file.
    """
    if size != entry.file_bytes or size < _HEADER_BYTES:
        return False
    # Each block of at most BLOCK_BYTES has one sum at the end of the file.
    n_blocks = -(-size // (BLOCK_BYTES + _SUM_BYTES))
    found = hashlib.sha256(read(0, _HEADER_BYTES) + read(size - n_blocks * _SUM_BYTES, size)).hexdigest()
    return found == entry.header_and_sums_sha256


def is_shard_at(path: Path, entry: ShardEntry) -> bool:
    """Return whether a local file is the shard of a manifest ``entry``, as :func:`is_shard_of` judges it."""
    if not is_plain_file(path):
        return False
    try:
        with open(path, "rb") as file:

            def read(start: int, end: int) -> bytes:
                file.seek(start)
                return file.read(end - start)

            return is_shard_of(entry, os.fstat(file.fileno()).st_size, read)
    except OSError:
        return False


def begins_as_shard(head: bytes) -> bool:
    """Return whether the first 2 KiB of a file are the beginning of a token shard of psannlm."""
    return f'"format":"{FORMAT}"'.encode() in head[:_HEADER_BYTES]


class Shard:
    """An open shard, a ``stream.Segment``: read-only views of the file, verified when they are first read.

    Every method raises ArtifactError if a block that it reads is damaged.
    """

    def __init__(
        self,
        path: Path,
        entry: ShardEntry,
        layout: _Layout,
        dtype: np.dtype[Any],
        file: BinaryIO,
        vocab_size: int | None = None,
        remedy: str = RESTORE_ADVICE,
    ) -> None:
        """For :func:`open_shard`, which has checked ``file``."""
        self.path, self.entry, self.dtype, self.vocab_size = path, entry, dtype, vocab_size
        self._remedy = remedy
        self.n_framed_tokens, self.n_documents = entry.tokens, entry.documents
        self._layout = layout
        # A plain array over the map: numpy's memmap class costs microseconds at every slice.
        self._bytes = map_bytes(file, layout.size)
        self._sums = self._bytes[layout.sums :].tobytes()
        self._is_checked = np.zeros(layout.n_blocks, dtype=bool)
        self._tokens = self._bytes[layout.tokens : layout.lengths].view(dtype.newbyteorder("<"))
        self._starts = self._bytes[layout.starts : layout.n_bytes].view("<i8")
        self._n_bytes = self._bytes[layout.n_bytes : layout.origins].view("<i8")
        self._origins = self._bytes[layout.origins : layout.hashes].view("<i8")
        self._hashes = self._bytes[layout.hashes : layout.tokens].reshape(-1, HASH_BYTES)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the file itself: pickled arrays would contain the whole file.
        return open_shard, (self.path.absolute(), self.entry, self._layout.fingerprint, self.vocab_size, self._remedy)

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Return a slice of the framed stream, (stop - start,) uint16 or uint32."""
        self._check(self._layout.tokens, self.dtype.itemsize, start, stop)
        return self._tokens[start:stop]

    def documents_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the document at each position of the stream, in the shape of ``positions``.

        The search may read unverified blocks; the result is then verified with checked blocks.
        """
        found = np.searchsorted(self._starts, positions, side="right") - 1
        np.clip(found, 0, self.n_documents - 1, out=found)
        first = (self._layout.starts + 8 * found) // BLOCK_BYTES
        last = (self._layout.starts + 8 * found + 15) // BLOCK_BYTES
        for block in np.union1d(first, last):
            if not self._is_checked[block]:
                self._check_block(int(block))
        if np.any((self._starts[found] > positions) | (positions >= self._starts[found + 1])):
            self._check(self._layout.starts, 8, 0, self.n_documents + 1)
            raise ArtifactError(f"{self.path} is inconsistent: its documents overlap. {self._remedy}.")
        return found

    def length_counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the distinct framed lengths of documents, ascending, and the number of each; both (n_lengths,)."""
        layout = self._layout
        self._check(layout.lengths, 1, 0, layout.sums - layout.lengths)
        table = np.frombuffer(self._bytes[layout.lengths : layout.sums].tobytes(), dtype="<i8").reshape(2, -1)
        return table[0], table[1]

    def starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the starts of documents ``start`` to ``stop`` (exclusive); that after the last is the stream's end."""
        self._check(self._layout.starts, 8, start, stop)
        return self._starts[start:stop]

    def n_bytes(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the UTF-8 bytes of the texts of some documents."""
        self._check(self._layout.n_bytes, 8, start, stop)
        return self._n_bytes[start:stop]

    def origins(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the origins of documents, as of ``framing.pack_origin``."""
        self._check(self._layout.origins, 8, start, stop)
        return self._origins[start:stop]

    def hashes(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return the ``framing.text_hash`` of documents, (stop - start, 16) uint8."""
        self._check(self._layout.hashes, HASH_BYTES, start, stop)
        return self._hashes[start:stop]

    def verify(self) -> None:
        """Verify all blocks that have not been verified yet."""
        self._check(0, 1, 0, self._layout.sums)

    def _check(self, at: int, item: int, start: int, stop: int) -> None:
        if start >= stop:
            return
        first, last = (at + item * start) // BLOCK_BYTES, (at + item * stop - 1) // BLOCK_BYTES
        for block in range(first, last + 1):
            if not self._is_checked[block]:
                self._check_block(block)

    def _check_block(self, block: int) -> None:
        end = min((block + 1) * BLOCK_BYTES, self._layout.sums)
        found = hashlib.sha256(self._bytes[block * BLOCK_BYTES : end].data).digest()
        if found != self._sums[_SUM_BYTES * block : _SUM_BYTES * (block + 1)]:
            where = f"between bytes {block * BLOCK_BYTES:,} and {end:,}"
            raise ArtifactError(f"{self.path} is damaged {where}. {self._remedy}.")
        self._refuse_unknown_ids(block * BLOCK_BYTES, end)
        self._is_checked[block] = 1

    def _refuse_unknown_ids(self, start: int, end: int) -> None:
        """Raise ArtifactError if a token in this range of bytes is outside the vocabulary."""
        first, last = max(start, self._layout.tokens), min(end, self._layout.lengths)
        if self.vocab_size is None or first >= last:
            return
        largest = int(self._bytes[first:last].view(self._tokens.dtype).max())
        if largest >= self.vocab_size:
            message = f"{self.path} holds the token id {largest:,}, and its tokenizer has {self.vocab_size:,} ids"
            raise ArtifactError(f"{message}. {self._remedy}.")


def open_shard(
    path: Path, entry: ShardEntry, fingerprint: str, vocab_size: int | None = None, remedy: str = RESTORE_ADVICE
) -> Shard:
    """Map the shard of a manifest ``entry`` into memory; only its header and block sums are read now.

    With a ``vocab_size``, blocks are also checked for token ids outside the vocabulary. ``remedy``: what errors about
    a block recommend.

    Raises:
        ArtifactError: the file is missing, truncated, damaged, of another format or tokenizer, or is not the shard of
            ``entry``.
    """
    path = Path(path)
    if not path.is_file():
        refuse_pointer(path, ArtifactError)
        raise ArtifactError(f"{path} is missing, but listed in the manifest. {RESTORE_ADVICE}.")
    try:
        with open(path, "rb") as file:
            layout, dtype = _checked_layout(path, entry, fingerprint, file)
            return Shard(path, entry, layout, dtype, file, vocab_size, remedy)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error


def _checked_layout(path: Path, entry: ShardEntry, fingerprint: str, file: BinaryIO) -> tuple[_Layout, np.dtype[Any]]:
    size = os.fstat(file.fileno()).st_size
    header = read_header(path, file, size, _HEADER_BYTES)
    fields = parse_header(path, header)
    metadata = parse_metadata(path, fields)
    if metadata.get("format") != FORMAT:
        raise ArtifactError(f"{path} is not a shard of this version: its format is {metadata.get('format')!r}")
    made_with = metadata.get("tokenizer_fingerprint", "")
    if made_with != fingerprint:
        raise ArtifactError(
            f"{path} was made with another tokenizer: its fingerprint is {made_with[:64]!r}, the folder's "
            f"{fingerprint!r}. {RESTORE_ADVICE}."
        )
    refuse_wrong_length(path, size, len(header), fields)
    n_lengths = _n_lengths(fields, entry.documents)
    layouts = {
        name: _Layout(kind, fingerprint, entry.tokens, entry.documents, n_lengths) for name, kind in TOKEN_TYPES.items()
    }
    fitting = [name for name, layout in layouts.items() if layout.header == header]
    if not fitting:
        raise ArtifactError(
            f"{path} is another shard than the manifest names, which has {entry.documents:,} documents of "
            f"{entry.tokens:,} tokens in all. {RESTORE_ADVICE}."
        )
    layout = layouts[fitting[0]]
    file.seek(layout.sums)
    sums = file.read(size - layout.sums)
    if hashlib.sha256(header + sums).hexdigest() != entry.header_and_sums_sha256:
        raise ArtifactError(f"{path} is damaged, or is another shard than the manifest names. {RESTORE_ADVICE}.")
    return layout, np.dtype(fitting[0])


def _n_lengths(fields: Mapping[str, Any], n_documents: int) -> int:
    """Return the number of distinct lengths in a header, 0 if missing; the whole header is compared later."""
    try:
        (n,) = fields["lengths"]["shape"]
    except (TypeError, KeyError, ValueError):
        return 0
    return n if type(n) is int and 0 <= n <= n_documents else 0

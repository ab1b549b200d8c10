"""Documents enter a few at a time and one shard file leaves; a shard opens in an instant and vouches for every byte.

A shard is a safetensors file of six tensors. Per document: ``starts`` (n_documents + 1,) I64, where it starts in the
stream; ``n_bytes`` (n_documents,) I64, UTF-8 bytes of its text; ``origins`` (n_documents,) I64, where it comes from;
``hashes`` (n_documents, 16) U8. Then ``tokens`` (n_tokens,) U16 or U32, the framed stream; and last ``block_sha256``
(n_blocks, 32) U8, the SHA-256 of each block of all bytes before it, header included. Wide types stand first, so that
every tensor is aligned in a memory map.

Reading 10 GB to hash it would make opening slow. So the manifest holds one hash of the header and the block sums, which
is checked at once, and the sums vouch for the blocks, each checked the first time that something in it is asked for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from psannlm.data.parts import HASH_BYTES, DocumentPart
from psannlm.errors import ArtifactError
from psannlm.storage import replacing
from psannlm.tensorheader import build_header, parse_header, parse_metadata, read_header, refuse_wrong_length

FORMAT = "psannlm-shard-1"
BLOCK_BYTES = 1 << 18
TOKEN_TYPES = {"uint16": "U16", "uint32": "U32"}
_SUM_BYTES = 32
_MAX_HEADER_BYTES = 1 << 16
_REMEDY = "Bring it back from a copy, or run psannlm prep again"


@dataclass(frozen=True)
class ShardEntry:
    """What a manifest says of one shard.

    ``tokens`` counts the framed stream, ``text_bytes`` the UTF-8 bytes of all texts, ``file_bytes`` the file itself.
    ``header_and_sums_sha256`` is the hash of the header followed by the block sums, which vouch for all the rest.
    """

    file: str
    tokens: int
    documents: int
    text_bytes: int
    file_bytes: int
    header_and_sums_sha256: str


class _Layout:
    """Where each tensor of a shard lies: a pure function of its sizes, so that no header has to be believed."""

    def __init__(self, token_type: str, fingerprint: str, n_tokens: int, n_documents: int) -> None:
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {
            "starts": ("I64", (n_documents + 1,)),
            "n_bytes": ("I64", (n_documents,)),
            "origins": ("I64", (n_documents,)),
            "hashes": ("U8", (n_documents, HASH_BYTES)),
            "tokens": (token_type, (n_tokens,)),
        }
        metadata = {"format": FORMAT, "tokenizer_fingerprint": fingerprint}
        # The header names the number of blocks, whose first is the header: its digits settle after a pass or two.
        n_blocks, former = 1, 0
        while n_blocks != former:
            former = n_blocks
            self.header = build_header({**tensors, "block_sha256": ("U8", (n_blocks, _SUM_BYTES))}, metadata)
            item = 2 if token_type == "U16" else 4
            self.starts = len(self.header)
            self.n_bytes = self.starts + 8 * (n_documents + 1)
            self.origins = self.n_bytes + 8 * n_documents
            self.hashes = self.origins + 8 * n_documents
            self.tokens = self.hashes + HASH_BYTES * n_documents
            self.sums = self.tokens + item * n_tokens
            n_blocks = -(-self.sums // BLOCK_BYTES)
        self.n_blocks = n_blocks
        self.size = self.sums + _SUM_BYTES * n_blocks


def write_shard(
    path: Path,
    *,
    dtype: DTypeLike,
    fingerprint: str,
    n_tokens: int,
    n_documents: int,
    parts: Iterable[DocumentPart],
) -> ShardEntry:
    """Write the documents of ``parts`` to ``path`` atomically, and return what the manifest is to say of the file.

    ``n_tokens`` counts framed tokens. No more than one part is held at a time; equal content gives equal bytes.

    Raises:
        StorageError: the disk is full or the folder cannot be written; ``path`` keeps its former content.
        ValueError: the parts do not come to ``n_tokens`` and ``n_documents``, or are no parts.
    """
    path, dtype = Path(path), np.dtype(dtype)
    layout = _Layout(TOKEN_TYPES[dtype.name], fingerprint, n_tokens, n_documents)
    with replacing(path) as temporary, open(temporary, "w+b") as file:
        file.write(layout.header)
        text_bytes = _write_parts(file, layout, dtype, n_tokens, n_documents, parts)
        file.seek(0)
        sums = b"".join(_block_sums(file, layout.sums))
        file.seek(layout.sums)
        file.write(sums)
    digest = hashlib.sha256(layout.header + sums).hexdigest()
    return ShardEntry(path.name, n_tokens, n_documents, text_bytes, layout.size, digest)


def _write_parts(
    file: BinaryIO,
    layout: _Layout,
    dtype: np.dtype[Any],
    n_tokens: int,
    n_documents: int,
    parts: Iterable[DocumentPart],
) -> int:
    """Write what stands between the header and the sums; return the UTF-8 bytes of all texts."""
    document = token = ended = text_bytes = 0
    _write_at(file, layout.starts, np.zeros(1, dtype="<i8"))
    for part in parts:
        part.refuse_disagreement()
        if document + len(part.lengths) > n_documents or token + len(part.tokens) > n_tokens:
            break
        ends = ended + np.cumsum(part.lengths)
        ended = int(ends[-1]) if len(ends) else ended
        if ended > token + len(part.tokens):
            raise ValueError(f"documents end at token {ended}, and {token + len(part.tokens)} are there")
        _write_at(file, layout.starts + 8 * (document + 1), ends.astype("<i8"))
        _write_at(file, layout.n_bytes + 8 * document, part.n_bytes.astype("<i8"))
        _write_at(file, layout.origins + 8 * document, part.origins.astype("<i8"))
        _write_at(file, layout.hashes + HASH_BYTES * document, part.hashes.astype("u1"))
        if part.tokens.dtype != dtype:
            raise ValueError(f"tokens are {part.tokens.dtype}, the shard is {dtype}")
        _write_at(file, layout.tokens + dtype.itemsize * token, part.tokens.astype(dtype.newbyteorder("<")))
        document, token = document + len(part.lengths), token + len(part.tokens)
        text_bytes += int(part.n_bytes.sum())
    else:
        if (document, token, ended) == (n_documents, n_tokens, n_tokens):
            return text_bytes
    raise ValueError(f"the parts do not come to {n_documents} documents of {n_tokens} tokens in all")


def _write_at(file: BinaryIO, at: int, values: NDArray[Any]) -> None:
    file.seek(at)
    file.write(np.ascontiguousarray(values).data)


def _block_sums(file: BinaryIO, end: int) -> Iterable[bytes]:
    for start in range(0, end, BLOCK_BYTES):
        yield hashlib.sha256(file.read(min(BLOCK_BYTES, end - start))).digest()


class Shard:
    """An open shard: arrays that are checked as they are asked for. They are read-only views of the file.

    Every method raises ArtifactError if a block that it needs is damaged.
    """

    def __init__(self, path: Path, entry: ShardEntry, layout: _Layout, dtype: np.dtype[Any], file: BinaryIO) -> None:
        """For :func:`open_shard`, which has checked ``file``."""
        self.path, self.entry, self.dtype = path, entry, dtype
        self.n_tokens, self.n_documents = entry.tokens, entry.documents
        self._layout = layout
        # A plain array over the map: numpy's memmap class costs microseconds at every slice.
        self._bytes = np.asarray(np.memmap(file, dtype=np.uint8, mode="r", shape=(layout.size,)))
        self._sums = self._bytes[layout.sums :].tobytes()
        self._is_checked = bytearray(layout.n_blocks)
        self._tokens = self._bytes[layout.tokens : layout.sums].view(dtype.newbyteorder("<"))
        self._starts = self._bytes[layout.starts : layout.n_bytes].view("<i8")
        self._n_bytes = self._bytes[layout.n_bytes : layout.origins].view("<i8")
        self._origins = self._bytes[layout.origins : layout.hashes].view("<i8")
        self._hashes = self._bytes[layout.hashes : layout.tokens].reshape(-1, HASH_BYTES)

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Return a slice of the framed stream, (stop - start,) uint16 or uint32."""
        self._check(self._layout.tokens, self.dtype.itemsize, start, stop)
        return self._tokens[start:stop]

    def starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return where documents ``start`` to ``stop`` (exclusive) start in the stream; one more is its end."""
        self._check(self._layout.starts, 8, start, stop)
        return self._starts[start:stop]

    def n_bytes(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the UTF-8 bytes of the texts of some documents."""
        self._check(self._layout.n_bytes, 8, start, stop)
        return self._n_bytes[start:stop]

    def origins(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return where some documents come from, each as ``parts.pack_origin`` writes it."""
        self._check(self._layout.origins, 8, start, stop)
        return self._origins[start:stop]

    def hashes(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return (stop - start, 16) uint8: ``parts.text_hash`` of some documents."""
        self._check(self._layout.hashes, HASH_BYTES, start, stop)
        return self._hashes[start:stop]

    def verify(self) -> None:
        """Check every block that has not been checked yet."""
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
            raise ArtifactError(f"{self.path} is damaged between bytes {block * BLOCK_BYTES:,} and {end:,}. {_REMEDY}.")
        self._is_checked[block] = 1


def open_shard(path: Path, entry: ShardEntry, fingerprint: str) -> Shard:
    """Map a shard that the manifest describes as ``entry`` into memory; a few KB of it are read now.

    Raises:
        ArtifactError: the file is missing, cut short, damaged, of another format, made with another tokenizer than
            ``fingerprint``, or is another shard than ``entry`` speaks of.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: the manifest beside it names it. {_REMEDY}.")
    try:
        with open(path, "rb") as file:
            layout, dtype = _checked_layout(path, entry, fingerprint, file)
            return Shard(path, entry, layout, dtype, file)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error


def _checked_layout(path: Path, entry: ShardEntry, fingerprint: str, file: BinaryIO) -> tuple[_Layout, np.dtype[Any]]:
    size = os.fstat(file.fileno()).st_size
    header = read_header(path, file, size, _MAX_HEADER_BYTES)
    fields = parse_header(path, header)
    metadata = parse_metadata(path, fields)
    if metadata.get("format") != FORMAT:
        raise ArtifactError(f"{path} is no shard of this version: its format is {metadata.get('format')!r}")
    made_with = metadata.get("tokenizer_fingerprint", "")
    if made_with != fingerprint:
        raise ArtifactError(
            f"{path} was made with another tokenizer: its fingerprint is {made_with[:64]!r}, the folder's "
            f"{fingerprint!r}. {_REMEDY}."
        )
    refuse_wrong_length(path, size, len(header), fields)
    layouts = {name: _Layout(kind, fingerprint, entry.tokens, entry.documents) for name, kind in TOKEN_TYPES.items()}
    fitting = [name for name, layout in layouts.items() if layout.header == header]
    if not fitting:
        raise ArtifactError(
            f"{path} is another shard than the manifest names, which has {entry.documents:,} documents of "
            f"{entry.tokens:,} tokens in all. {_REMEDY}."
        )
    layout = layouts[fitting[0]]
    file.seek(layout.sums)
    sums = file.read(size - layout.sums)
    if hashlib.sha256(header + sums).hexdigest() != entry.header_and_sums_sha256:
        raise ArtifactError(f"{path} is damaged, or is another shard than the manifest names. {_REMEDY}.")
    return layout, np.dtype(fitting[0])

"""Reading of corpus files and standard input: decompression, detection of formats, and decoding of UTF-8."""

from __future__ import annotations

import gzip
import importlib
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from psannlm.data.corpus.files import (
    STDIN,
    explained_remote_errors,
    missing_module,
    remote_file_system,
    split_suffix,
)
from psannlm.data.corpus.formats import HEAD_BYTES, compression, is_binary, unicode_encoding, why_not_text
from psannlm.display import shell_argument
from psannlm.errors import CorpusError
from psannlm.io.lfs_pointers import pointer_in, refuse_pointer
from psannlm.io.limits import MAX_LINE_BYTES, max_document_bytes
from psannlm.io.urls import is_remote

REPLACEMENT = "\ufffd"
_MARK = b"\xef\xbb\xbf"
_CHUNK_BYTES = 1 << 20

Seen = Callable[[memoryview], object]


class _Stored(io.RawIOBase):
    """The bytes of a file, with a look at its beginning; ``seen`` is called once for each block that is read."""

    def __init__(self, raw: Any, seen: Seen | None) -> None:
        self._seen = seen
        # readinto1 returns the bytes that standard input has; readinto would wait for a full buffer.
        self._read_into = getattr(raw, "readinto1", raw.readinto)
        self._ahead = b""

    def readable(self) -> bool:
        return True

    def head(self, waits: bool) -> bytes:
        """Return the first bytes; without ``waits`` only those that are available at once."""
        while len(self._ahead) < HEAD_BYTES:
            block = bytearray(HEAD_BYTES)
            n_bytes = self._fetch(block)
            self._ahead += block[:n_bytes]
            if not n_bytes or not waits:
                break
        return self._ahead

    def readinto(self, buffer: Any) -> int:
        if not self._ahead:
            return self._fetch(buffer)
        n_bytes = min(len(buffer), len(self._ahead))
        buffer[:n_bytes], self._ahead = self._ahead[:n_bytes], self._ahead[n_bytes:]
        return n_bytes

    def _fetch(self, buffer: Any) -> int:
        n_bytes: int = self._read_into(buffer)
        if self._seen is not None:
            self._seen(memoryview(buffer)[:n_bytes])
        return n_bytes


@contextmanager
def _raw(path: str) -> Iterator[BinaryIO]:
    if path == STDIN:
        yield sys.stdin.buffer
    elif is_remote(path):
        system, name = remote_file_system(path)
        with explained_remote_errors(path):
            opener = system.open(name, "rb")
        with opener as raw:
            yield raw
    else:
        refuse_pointer(path, CorpusError)
        with open(path, "rb", buffering=0) as file:
            yield file


@contextmanager
def opened(path: str, seen: Seen | None = None, *, waits: bool = True) -> Iterator[BinaryIO]:
    """Open a text file; gzip and zstd are decompressed, whatever the name of the file.

    ``-`` is standard input, read in the same way. Parquet files, by name, are returned as stored.

    Args:
        seen: called with all stored bytes, in order.
        waits: False if the writer of standard input may wait for an answer: the format is then detected from the bytes
            that are available at once.

    Raises:
        CorpusError: the file cannot be opened or read, is damaged or truncated, is not text, or memory ran out.
    """
    name = shown_name(path)
    try:
        with _raw(path) as raw:
            is_table = split_suffix(path)[0] == ".parquet"
            if is_table and seen is None:
                yield raw
                return
            stored = _Stored(raw, seen)
            with io.BufferedReader(stored, _CHUNK_BYTES) as file:
                yield file if is_table else _unpacked(path, stored, file, waits)
                # A decompressor may stop before the end of the file.
                while seen is not None and file.read(_CHUNK_BYTES):
                    pass
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{name}: damaged or cut short ({error}); copy or compress the file again") from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CorpusError(f"{name}: cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise CorpusError(f"{name}: memory ran out while it was read; split it into smaller files or lines") from error


def read_range(path: str, start: int, n_bytes: int) -> bytes:
    """Return ``n_bytes`` stored bytes of a file or URL from ``start``; fewer at its end.

    Raises:
        CorpusError: it cannot be read.
    """
    try:
        if is_remote(path):
            system, name = remote_file_system(path)
            with explained_remote_errors(path):
                return bytes(system.cat_file(name, start=start, end=start + n_bytes))
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(n_bytes)
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror or error}") from error


def is_compressed(path: str) -> bool:
    """Return whether a file is gzip or zstd, by its first bytes. Raises CorpusError if it cannot be read."""
    try:
        with _raw(path) as raw:
            return bool(compression(_Stored(raw, None).head(waits=True)))
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror or error}") from error


def shown_name(path: str) -> str:
    """Return the name of a file in errors: standard input is ``stdin``."""
    return "stdin" if path == STDIN else path


def _unpacked(path: str, stored: _Stored, file: BinaryIO, waits: bool) -> BinaryIO:
    """Return the decompressed text of a file. Raises CorpusError if its first bytes are not text."""
    name, file_name = shown_name(path), _as_argument(path)
    head = stored.head(waits)
    packing = compression(head)
    # A Git server may send the pointer of a file in Git LFS.
    if problem := pointer_in(head):
        raise CorpusError(f"{name}: {problem}")
    if not packing:
        if head and (named := split_suffix(path)[1]):
            raise EOFError(f"it is not a {named} file; if it is plain text, rename it")
        if problem := why_not_text(head, file_name):
            raise CorpusError(f"{name} {problem}")
        return file
    inner: Any
    if packing == ".gz":
        inner = gzip.GzipFile(fileobj=file)
    else:
        if problem := missing_module("zstandard"):
            raise CorpusError(f"{name}: {problem}")
        inner = importlib.import_module("psannlm.data.corpus.zstd").ZstandardReader(file, name)
    unpacked = _Stored(inner, None)
    head = unpacked.head(waits)
    if compression(head):
        raise CorpusError(f"{name} is compressed twice; unpack it once")
    if problem := why_not_text(head, "FILE"):
        raise CorpusError(f"{name}, decompressed, {problem}")
    return io.BufferedReader(unpacked, _CHUNK_BYTES)


def bounded_lines(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Yield the lines of a file with their ends; only ``\\n`` ends a line.

    Raises:
        CorpusError: a line is too long; names file and line.
    """
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise CorpusError(
                f"{name}:{number}: a line of more than {MAX_LINE_BYTES >> 20} MiB, the maximum; end "
                "lines where documents end, or save so long a text as a .txt file that is read whole"
            )
        yield line


def read_whole(file: BinaryIO, name: str) -> bytes | bytearray:
    """Return all bytes of a file.

    Raises:
        CorpusError: the file is larger than a document may be; names the file.
    """
    content, limit = bytearray(), max_document_bytes()
    while block := file.read(_CHUNK_BYTES):
        content += block
        if len(content) > limit:
            raise CorpusError(
                f"{name}: one document of more than {limit:,} bytes, a quarter of this machine's memory; read it line "
                "by line (per_line), split it into files, or prepare it with psannlm prep, which reads it in parts"
            )
    return content


def read_text(path: str) -> tuple[str, bool]:
    """Return the text of a file without a byte order mark, and whether it had one.

    Raises:
        CorpusError: as :func:`opened` and :func:`read_whole`, and for bytes that are not UTF-8.
    """
    with opened(path) as file:
        content = read_whole(file, shown_name(path))
    return decoded(content, path, 0)


def read_lines(path: str) -> Iterator[str]:
    """Yield the lines of a file or of standard input (``-``) with their ends, without a byte order mark.

    Raises:
        CorpusError: as :func:`opened` and :func:`bounded_lines`, and for bytes that are not UTF-8.
    """
    offset = 0
    with opened(path) as file:
        for line in bounded_lines(file, shown_name(path)):
            yield decoded(line, path, offset)[0]
            offset += len(line)


def decoded(content: bytes | bytearray, path: str, offset: int, advice: str = "") -> tuple[str, bool]:
    """Decode ``content``, at byte ``offset`` of ``path``; return the text and whether a byte order mark was removed.

    Raises:
        CorpusError: a byte is not UTF-8; names file, position and byte, and adds ``advice``.
    """
    has_mark = offset == 0 and content.startswith(_MARK)
    skipped = len(_MARK) if has_mark else 0
    try:
        return str(memoryview(content)[skipped:], "utf-8"), has_mark
    except UnicodeDecodeError as error:
        at = skipped + error.start
    where = f"byte {offset + at:,}" + (" of the decompressed text" if split_suffix(path)[1] else "")
    raise CorpusError(
        f"{shown_name(path)}: {where} is 0x{content[at]:02X}, {_other_encoding(content, path, offset)}{advice}"
    )


def _as_argument(path: str) -> str:
    """Return the file name for a printed command, quoted for a shell."""
    return "FILE" if path == STDIN or is_remote(path) else shell_argument(path)


def _other_encoding(content: bytes | bytearray, path: str, offset: int) -> str:
    """Return the probable encoding of bytes that are not UTF-8, and the remedy."""
    head = bytes(content[:HEAD_BYTES])
    encoding = (unicode_encoding(head) if offset == 0 else None) or "latin1"
    if encoding == "latin1" and is_binary(head):
        return "which is not UTF-8; control characters are among its bytes, so this is binary data: leave the file out"
    file_name = _as_argument(path)
    return (
        "which is not UTF-8. If the file is in another encoding, convert it: "
        f"iconv -f {encoding} -t utf-8 {file_name} > converted.txt"
    )


def replaced(content: bytes | bytearray | memoryview, text: str) -> int:
    """Return the number of bytes of ``content`` that are not UTF-8, given its text with replacements."""
    # EF always begins a character, so each EF BF BD in the content is a U+FFFD of the original text.
    inserted = text.count(REPLACEMENT) - bytes(content).count(REPLACEMENT.encode())
    return len(content) - (len(text.encode("utf-8")) - len(REPLACEMENT.encode()) * inserted)

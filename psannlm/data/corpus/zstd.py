"""Decompression of Zstandard frames in bounded memory: the window and one mebibyte, whatever the compression ratio.

Blocks are counted before they are decompressed. A block has at most 128 KiB, and the library gets eight at a time: in a
hostile file a block may take four bytes, so that a mebibyte of input could request 32 GiB at once.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator
from typing import Any, BinaryIO

from psannlm.errors import CorpusError
from psannlm.io.limits import MAX_ZSTD_WINDOW_BYTES, machine_memory_bytes

_MAGIC = b"\x28\xb5\x2f\xfd"
_LARGEST_BLOCK_BYTES = 128 << 10
_OUTPUT_BYTES = 1 << 20
_DICTIONARY_ID_BYTES = (0, 1, 2, 4)


class ZstandardReader(io.RawIOBase):
    """Reader of concatenated frames; skippable frames are skipped, and a truncated frame raises EOFError.

    ``raw`` gives as many bytes as it is asked for, unless it ends; ``name`` names it in errors.
    """

    def __init__(self, raw: BinaryIO, name: str) -> None:
        self._raw, self._name = raw, name
        self._zstandard: Any = importlib.import_module("zstandard")
        self._decompressor = self._zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES)
        self._outputs = self._unpacked()
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            output = next(self._outputs, None)
            if output is None:
                return 0
            self._ready = memoryview(output)
        n_bytes = min(len(buffer), len(self._ready))
        buffer[:n_bytes] = self._ready[:n_bytes]
        self._ready = self._ready[n_bytes:]
        return n_bytes

    def _unpacked(self) -> Iterator[bytes]:
        while magic := self._raw.read(4):
            if magic == _MAGIC:
                try:
                    yield from self._frame()
                except self._zstandard.ZstdError as error:
                    raise EOFError(str(error)) from error
            elif magic[1:] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5:
                self._skip(int.from_bytes(self._exactly(4), "little"))
            else:
                raise EOFError("no frame begins where one must")

    def _frame(self) -> Iterator[bytes]:
        descriptor = self._exactly(1)
        is_single, has_checksum = bool(descriptor[0] & 0x20), bool(descriptor[0] & 0x04)
        n_size = (1 if is_single else 0, 2, 4, 8)[descriptor[0] >> 6]
        window_field = b"" if is_single else self._exactly(1)
        dictionary = self._exactly(_DICTIONARY_ID_BYTES[descriptor[0] & 3])
        size_field = self._exactly(n_size)
        if any(dictionary):
            raise CorpusError(
                f"{self._name}: compressed with a dictionary, which is not available; compress it without"
            )
        n_bytes = int.from_bytes(size_field, "little") + (256 if n_size == 2 else 0)
        window = n_bytes if is_single else _window(window_field[0])
        self._refuse_window(window, n_bytes if n_size else window)
        unpacker = self._decompressor.decompressobj()
        packed = [_MAGIC, descriptor, window_field, dictionary, size_field]
        block_bytes = max(1, min(window, _LARGEST_BLOCK_BYTES))
        n_left, is_last = _OUTPUT_BYTES, False
        while not is_last:
            header = self._exactly(3)
            number = int.from_bytes(header, "little")
            is_last, is_run, n_stored = bool(number & 1), number >> 1 & 3 == 1, number >> 3
            packed += [header, self._exactly(1 if is_run else n_stored)]
            n_left -= block_bytes
            if n_left <= 0 or is_last:
                packed.append(self._exactly(4) if is_last and has_checksum else b"")
                if output := unpacker.decompress(b"".join(packed)):
                    yield output
                packed.clear()
                n_left = _OUTPUT_BYTES
        if not unpacker.eof:
            raise EOFError("a frame has no end")

    def _refuse_window(self, window: int, n_bytes: int) -> None:
        if window > MAX_ZSTD_WINDOW_BYTES:
            raise CorpusError(
                f"{self._name}: packed with a window of {window:,} bytes; the library reads up to "
                f"{MAX_ZSTD_WINDOW_BYTES:,}: compress it again with zstd --long=31 or less"
            )
        memory = machine_memory_bytes()
        if memory is not None and (needed := min(window, n_bytes)) > memory // 2:
            raise CorpusError(
                f"{self._name}: unpacking takes {needed:,} bytes of memory (its window), more than half of the "
                f"{memory:,} here; compress it again without --long"
            )

    def _exactly(self, n_bytes: int) -> bytes:
        content = self._raw.read(n_bytes)
        if len(content) < n_bytes:
            raise EOFError("the last frame has no end")
        return content

    def _skip(self, n_bytes: int) -> None:
        while n_bytes:
            n_bytes -= len(self._exactly(min(n_bytes, _OUTPUT_BYTES)))


def _window(descriptor: int) -> int:
    base = 1 << (10 + (descriptor >> 3))
    return base + (base >> 3) * (descriptor & 7)

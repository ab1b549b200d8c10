"""Zstandard frames: any window, truncation and limits on memory."""

from __future__ import annotations

import io
import os
import tracemalloc
from pathlib import Path

import pytest

from psannlm.data.corpus import zstd
from psannlm.data.corpus.reading import opened, read_text
from psannlm.data.corpus.zstd import ZstandardReader
from psannlm.errors import CorpusError

zstandard = pytest.importorskip("zstandard")
SKIPPABLE = b"\x5a\x2a\x4d\x18\x05\x00\x00\x00other"


def frame(content: bytes, window_log: int = 21, **settings: object) -> bytes:
    """Return a frame as a stream writes it: its size is not in its header."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log, **settings)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return bytes(packer.compress(content) + packer.flush())


def unpacked(content: bytes) -> bytes:
    return io.BufferedReader(ZstandardReader(io.BytesIO(content), "a.zst")).read()


@pytest.mark.parametrize("window_log", [10, 21, 28, 31])
def test_frames_of_any_window_are_read(window_log: int) -> None:
    content = os.urandom(200_000) + bytes(300_000) + b"waves " * 1000
    assert unpacked(frame(content, window_log, write_checksum=1)) == content


def test_frames_one_after_another_and_skippable_ones_are_read(tmp_path: Path) -> None:
    parts = [os.urandom(3000).hex().encode(), b"", b"x", b"y" * 400_000]
    packed = SKIPPABLE + b"".join(frame(part) + SKIPPABLE for part in parts) + zstandard.compress(b"end")
    assert unpacked(packed) == b"".join(parts) + b"end"
    (tmp_path / "a.txt.zst").write_bytes(packed)
    assert read_text(str(tmp_path / "a.txt.zst"))[0].encode() == b"".join(parts) + b"end"


@pytest.mark.parametrize("checksum", [0, 1])
def test_a_frame_that_is_cut_anywhere_is_an_error(checksum: int) -> None:
    whole = frame(os.urandom(3000) + bytes(200_000), write_checksum=checksum)
    for n_bytes in (*range(1, 12), len(whole) // 2, len(whole) - 4, len(whole) - 1):
        with pytest.raises(EOFError):
            unpacked(whole[:n_bytes])
    flipped = bytearray(whole)
    flipped[4] |= 0x08  # a bit that the format reserves
    with pytest.raises(EOFError):
        unpacked(bytes(flipped))


def run_blocks(n_blocks: int) -> bytes:
    """Return a frame of blocks of 128 KiB of one letter each, of four bytes a block."""
    size = (128 << 10) << 3
    blocks = (size | 1 << 1).to_bytes(3, "little") + b"a"
    last = (size | 1 << 1 | 1).to_bytes(3, "little") + b"a"
    return b"\x28\xb5\x2f\xfd\x00\x38" + blocks * (n_blocks - 1) + last


def test_zstd_large_expansion_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(run_blocks(800))
    assert path.stat().st_size < 4000
    n_bytes = 0
    tracemalloc.start()
    with opened(str(path)) as file:
        while block := file.read(1 << 16):
            n_bytes += len(block)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n_bytes == 800 * 128 << 10
    assert peak < 8 << 20


def test_a_window_larger_than_memory_or_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = frame(b"waves" * 100, 31)
    larger = packed[:5] + bytes([packed[5] + 8]) + packed[6:]
    with pytest.raises(CorpusError, match=r"a\.zst: packed with a window of 4,294,967,296 bytes.*--long=31"):
        unpacked(larger)
    monkeypatch.setattr(zstd, "machine_memory_bytes", lambda: 1 << 30)
    with pytest.raises(CorpusError, match=r"a\.zst: unpacking takes 2,147,483,648 bytes of memory"):
        unpacked(packed)
    # What is known to be small needs no window.
    assert unpacked(zstandard.compress(b"waves")) == b"waves"

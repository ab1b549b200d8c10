"""Exact deduplication of documents by their hashes, in bounded memory.

Hashes are partitioned into buckets on disk by their value, so that equal hashes are in one bucket, and one bucket is
sorted at a time. Two texts count as equal if their 128-bit BLAKE2 hashes are.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psannlm.io.atomic import explain_write_errors, temporary_beside

_ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u8")])
# A bucket is sorted in memory, which takes about three times its size.
_BUCKET_BYTES = 32 << 20
_MOST_BUCKETS = 512


class Bits:
    """A set of document numbers below ``n``, stored as one bit per document."""

    def __init__(self, n: int) -> None:
        self._bytes = np.zeros((n + 7) // 8, np.uint8)

    def add(self, numbers: NDArray[Any]) -> None:
        """Add document numbers to the set."""
        numbers = numbers.astype(np.int64, copy=False)
        np.bitwise_or.at(self._bytes, numbers >> 3, (128 >> (numbers & 7)).astype(np.uint8))

    def among(self, first: int, stop: int) -> NDArray[np.bool_]:
        """Return which numbers from ``first`` to ``stop`` (exclusive) are in the set, (stop - first,) bool."""
        start = first >> 3
        bits = np.unpackbits(self._bytes[start : (stop + 7) >> 3])
        return bits[first - 8 * start : stop - 8 * start].astype(np.bool_)


class DuplicateFinder:
    """Takes the hashes of ``n`` documents in reading order and finds those that repeat an earlier one.

    ``folder``: an existing folder for the temporary buckets.
    """

    def __init__(self, folder: Path, n: int, bucket_bytes: int = _BUCKET_BYTES) -> None:
        self._n = n
        self._n_buckets = min(_MOST_BUCKETS, max(1, -(-n * _ROW.itemsize // bucket_bytes)))
        self._paths: list[Path] = []
        self._folder = folder
        self._open = ExitStack()

    def __enter__(self) -> DuplicateFinder:
        with explain_write_errors(self._folder):
            buckets = self._open.enter_context(temporary_beside(self._folder / "buckets"))
            buckets.mkdir()
            self._paths = [buckets / f"bucket_{number:03d}" for number in range(self._n_buckets)]
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, numbers: NDArray[np.int64], hashes: NDArray[np.uint8]) -> None:
        """Add documents: ``numbers``, (k,) ascending, and ``hashes``, (k, 16).

        Raises:
            StorageError: the buckets cannot be written.
        """
        rows = np.empty(len(numbers), _ROW)
        words = np.ascontiguousarray(hashes).view("<u8")
        rows["high"], rows["low"], rows["number"] = words[:, 0], words[:, 1], numbers
        bucket = (rows["high"] % np.uint64(self._n_buckets)).astype(np.int64)
        with explain_write_errors(self._folder):
            for index in np.unique(bucket):
                # One at a time: a process may have fewer files open than there are buckets.
                with open(self._paths[index], "ab") as file:
                    file.write(rows[bucket == index].tobytes())

    def repeated(self) -> Bits:
        """Return the numbers of all documents whose hash equals that of an earlier document.

        Raises:
            StorageError: the buckets cannot be written.
        """
        found = Bits(self._n)
        for path in self._paths:
            rows = np.fromfile(path, _ROW) if path.exists() else np.zeros(0, _ROW)
            # A stable sort leaves equal hashes in reading order.
            rows = rows[np.lexsort((rows["low"], rows["high"]))]
            is_again = np.zeros(len(rows), np.bool_)
            is_again[1:] = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
            found.add(rows["number"][is_again])
        return found

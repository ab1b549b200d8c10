"""Hashes of documents enter in reading order; which of them stood there before leaves, in bounded memory.

Hashes go to buckets on disk by their own bits, so that equal ones meet in one bucket, and one bucket is looked through
at a time. Two texts are taken for the same when 128 bits of BLAKE2 are.
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
    """A set of document numbers below ``n``, an eighth of a byte for each of them."""

    def __init__(self, n: int) -> None:
        self._bytes = np.zeros((n + 7) // 8, np.uint8)

    def add(self, numbers: NDArray[Any]) -> None:
        """Put document numbers into the set."""
        numbers = numbers.astype(np.int64, copy=False)
        np.bitwise_or.at(self._bytes, numbers >> 3, (128 >> (numbers & 7)).astype(np.uint8))

    def among(self, first: int, stop: int) -> NDArray[np.bool_]:
        """Return which of the numbers from ``first`` to ``stop`` are in the set, (stop - first,) bool."""
        start = first >> 3
        bits = np.unpackbits(self._bytes[start : (stop + 7) >> 3])
        return bits[first - 8 * start : stop - 8 * start].astype(np.bool_)


class DuplicateFinder:
    """Takes the hashes of ``n`` documents in reading order and finds those that another had before.

    ``folder`` is where buckets are kept meanwhile; it must be there.
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
        """Take documents by ``numbers``, (k,) rising, with their ``hashes``, (k, 16).

        Raises:
            StorageError: there is no room for the buckets.
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
        """Return the numbers of all documents whose hash an earlier one has.

        Raises:
            StorageError: there is no room for the buckets.
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

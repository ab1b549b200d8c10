"""Index of unpacked windows, each of which has tokens of one document only.

The number of windows of a segment follows from its table of document lengths, so that counting them reads almost
nothing. The document of a window is found in two steps: by the number of windows before each block of documents, then
within the block. These sums are computed when a segment is first used, and take half a bit per document.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from psannlm.data.stream import Segment
from psannlm.errors import ArtifactError

_BLOCK_DOCUMENTS = 128
# Blocks summed up at a time: 1 MB of document starts.
_BLOCKS_AT_ONCE = 1024


class UnpackedWindowIndex:
    """Windows of ``seq_len`` labels over the documents of ``segments``, in order, one document per window."""

    def __init__(self, segments: Sequence[Segment], seq_len: int) -> None:
        self._segments = segments
        self._seq_len = seq_len
        totals = []
        for segment in segments:
            lengths, counts = segment.length_counts()
            totals.append(int((self._n_windows(lengths) * counts).sum()))
        self._first_window = np.array([0, *accumulate(totals)], dtype=np.int64)
        self._first_position = [0, *accumulate(segment.n_framed_tokens for segment in segments)]
        self._sums: list[NDArray[np.int64] | None] = [None] * len(segments)

    def __len__(self) -> int:
        return int(self._first_window[-1])

    def spans(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the start of each window in the stream, and the end (exclusive) of its document; (B,) each.

        Raises:
            ArtifactError: a shard is damaged or inconsistent.
        """
        start, end = np.empty_like(indices), np.empty_like(indices)
        of_segment = np.searchsorted(self._first_window, indices, side="right") - 1
        for number in np.unique(of_segment):
            sums = self._block_sums(int(number))
            local = indices - self._first_window[number]
            of_block = np.where(of_segment == number, np.searchsorted(sums, local, side="right") - 1, -1)
            for block in np.unique(of_block[of_block >= 0]):
                is_here = of_block == block
                starts = self._starts(int(number), int(block), 1)
                firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._n_windows(np.diff(starts)))])
                within = local[is_here] - sums[block]
                document = np.searchsorted(firsts, within, side="right") - 1
                base = self._first_position[number]
                start[is_here] = base + starts[document] + (within - firsts[document]) * self._seq_len
                end[is_here] = base + starts[document + 1]
        return start, end

    def _n_windows(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of windows of documents with these framed lengths."""
        return -(-(lengths - 1) // self._seq_len)

    def _starts(self, number: int, block: int, n_blocks: int) -> NDArray[np.int64]:
        """Return the starts of the documents of ``n_blocks`` blocks, and the end of the last."""
        segment = self._segments[number]
        end = min((block + n_blocks) * _BLOCK_DOCUMENTS, segment.n_documents)
        return segment.starts(block * _BLOCK_DOCUMENTS, end + 1)

    def _block_sums(self, number: int) -> NDArray[np.int64]:
        """Return the number of windows of a segment before each of its blocks, and in total."""
        sums = self._sums[number]
        if sums is None:
            n_blocks = -(-self._segments[number].n_documents // _BLOCK_DOCUMENTS)
            counts = np.empty(n_blocks, dtype=np.int64)
            for block in range(0, n_blocks, _BLOCKS_AT_ONCE):
                windows = self._n_windows(np.diff(self._starts(number, block, _BLOCKS_AT_ONCE)))
                counts[block : block + _BLOCKS_AT_ONCE] = np.add.reduceat(
                    windows, np.arange(0, len(windows), _BLOCK_DOCUMENTS)
                )
            sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
            if sums[-1] != self._first_window[number + 1] - self._first_window[number]:
                raise ArtifactError(
                    f"shard {number} is inconsistent: its table of lengths does not match its documents"
                )
            self._sums[number] = sums
        return sums

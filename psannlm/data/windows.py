"""Training windows of T inputs and T labels over a stream of framed documents.

A window has T + 1 ids of the stream: the first T are inputs, the last T labels. Neighbours overlap by one id, the last
label of one and first input of the next, so that every token is a label exactly once. Packed windows are slices of the
whole stream; without packing each document has windows of its own. The last window is padded. BOS is not a label: the
text before it belongs to another document and cannot predict it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from psannlm.config.constants import IGNORE_INDEX
from psannlm.data.stream import Stream
from psannlm.data.unpacked import UnpackedWindowIndex
from psannlm.errors import ConfigError


class Windows:
    """The windows of a stream, computed on demand; only the index of unpacked windows takes memory.

    ``data.dataset.LMDataset`` gives one window at a time.
    """

    def __init__(
        self, store: Stream, seq_len: int, *, pad_id: int, pack: bool = True, isolate_documents: bool = False
    ) -> None:
        """``seq_len`` is T. Raises ConfigError if it is below 1."""
        if seq_len < 1:
            raise ConfigError(f"a window of {seq_len} tokens is empty; set data.max_length to 1 or more")
        self.store = store
        self.seq_len = seq_len
        self.pad_id = pad_id
        self.isolate_documents = isolate_documents
        self._unpacked_index = None if pack else UnpackedWindowIndex(store.segments, seq_len)
        packed = -(-max(0, store.n_framed_tokens - 1) // seq_len)
        self._n_windows = packed if self._unpacked_index is None else len(self._unpacked_index)

    def __len__(self) -> int:
        return self._n_windows

    @property
    def is_packed(self) -> bool:
        """Whether a window may hold several documents."""
        return self._unpacked_index is None

    @property
    def n_labels(self) -> int:
        """Number of valid labels in all windows: the ids of all documents and their EOS."""
        return self.store.n_framed_tokens - self.store.n_documents

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input ids (B, T) int64 and labels (B, T) int64 of the windows ``indices``.

        Labels of padding and BOS are ``IGNORE_INDEX``. Raises IndexError for an index out of range.
        """
        input_ids, labels = self._rows(self._checked(indices))
        return torch.from_numpy(input_ids), torch.from_numpy(labels)

    def document_positions(self, indices: Sequence[int] | NDArray[np.int64]) -> torch.Tensor | None:
        """Return the position (B, T) int64 of each input of the windows ``indices`` in its document.

        A document that began in an earlier window counts from the start of this one. Padding continues the last
        document. None where documents are not isolated or no window of the batch holds a border: then the pass without
        a mask computes the same.

        Raises IndexError for an index out of range.
        """
        if not (self.isolate_documents and self.is_packed):
            return None
        starts, stops = self._spans(self._checked(indices))
        # Inputs end one id before the window does; a document that begins with its last label has no input in it.
        first, last = self.store.documents_at(np.stack([starts, np.maximum(starts, stops - 2)]))
        if np.array_equal(first, last):
            return None
        begins = np.zeros((len(starts), self.seq_len), dtype=np.int64)
        for row, start in enumerate(starts.tolist()):
            borders = self.store.starts(int(first[row]) + 1, int(last[row]) + 1) - start
            begins[row, borders] = borders
        return torch.from_numpy(np.arange(self.seq_len) - np.maximum.accumulate(begins, axis=1))

    def label_documents(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number (B, T) int64 of the document that each label of the windows ``indices`` belongs to.

        Of padding it is that of any document. Raises IndexError for an index out of range.
        """
        starts, _ = self._spans(self._checked(indices))
        positions = starts[:, None] + 1 + np.arange(self.seq_len)
        return self.store.documents_at(np.minimum(positions, self.store.n_framed_tokens - 1))

    def describe(self, index: int) -> str:
        """Return a description of the documents in window ``index``. Raises IndexError for an index out of range."""
        start, stop = (int(bound[0]) for bound in self._spans(self._checked([index])))
        first, last = (int(d) for d in self.store.documents_at(np.array([start, stop - 1])))
        if first == last:
            begin, end = (int(start) for start in self.store.starts(first, first + 2))
            name = self.store.name(first)
            return f"window {index}: {name}, tokens {start - begin} to {stop - begin - 1} of {end - begin}"
        between = f" and {last - first - 1} more between them" if last - first > 1 else ""
        return f"window {index}: from {self.store.name(first)} to {self.store.name(last)}{between}"

    def _checked(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        wanted = np.asarray(indices, dtype=np.int64)
        # numpy would count a negative index from the end and return a window twice.
        outside = wanted[(wanted < 0) | (wanted >= self._n_windows)]
        if outside.size:
            raise IndexError(f"window {int(outside[0])} of {self._n_windows}")
        return wanted

    def _spans(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the start and end (exclusive) of each window in the stream."""
        if self._unpacked_index is None:
            start = indices * self.seq_len
            end = np.full_like(start, self.store.n_framed_tokens)
        else:
            start, end = self._unpacked_index.spans(indices)
        return start, np.minimum(end, start + self.seq_len + 1)

    def _rows(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        starts, stops = self._spans(indices)
        ids = np.full((len(indices), self.seq_len + 1), self.pad_id, dtype=np.int64)
        # By position, not by id: a third-party tokenizer may use the id of padding or BOS for text too.
        is_label = np.zeros(ids.shape, dtype=bool)
        first, last = self.store.documents_at(np.stack([starts, stops - 1]))
        for row, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
            ids[row, : stop - start] = self.store.tokens(start, stop)
            is_label[row, : stop - start] = True
            # The first position of a window is never a label, so only documents that begin after it matter.
            begins = self.store.starts(int(first[row]) + 1, int(last[row]) + 1)
            is_label[row, begins - start] = False
        return np.ascontiguousarray(ids[:, :-1]), np.where(is_label, ids, IGNORE_INDEX)[:, 1:].copy()

"""Token stores enter; training windows of T inputs and T labels leave, with every token a label exactly once.

Each document is framed: begin of text, its ids, end of text. A window is T + 1 framed ids, of which the first T are
inputs and the last T labels, and neighbours overlap by one id: what is the last label of one is the first input of
the next. So nothing falls between two windows. Packed windows run over the framed documents joined end to end; with
packing off each document has windows of its own. What is left at the end becomes a padded window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from psannlm.data.shards import TokenStore
from psannlm.errors import ConfigError

IGNORE_INDEX = -100


class Windows:
    """The windows of a store, made when asked for: beside the store it keeps 8 to 16 bytes per document."""

    def __init__(
        self, store: TokenStore, seq_len: int, *, bos_id: int, eos_id: int, pad_id: int, pack: bool = True
    ) -> None:
        """``seq_len`` is T. Raises ConfigError if it is below 1."""
        if seq_len < 1:
            raise ConfigError(f"a window of {seq_len} tokens holds nothing; set data.max_length to 1 or more")
        self.store = store
        self.seq_len = seq_len
        self.pack = pack
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        # Framed document d is [starts[d], starts[d + 1]) in the joined stream: two specials more than its own ids.
        self._starts = store.offsets + 2 * np.arange(store.n_documents + 1, dtype=np.int64)
        if pack:
            self._n_windows = -(-max(0, int(self._starts[-1]) - 1) // seq_len)
        else:
            # Windows of document d are numbered [first_window[d], first_window[d + 1]).
            per_document = -(-(np.diff(self._starts) - 1) // seq_len)
            self._first_window = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(per_document)])
            self._n_windows = int(self._first_window[-1])
        self._columns = np.arange(seq_len + 1, dtype=np.int64)

    def __len__(self) -> int:
        return self._n_windows

    @property
    def n_labels(self) -> int:
        """Labels that count, over all windows: every document's ids and its end of text."""
        return self.store.n_tokens + self.store.n_documents

    def __getitem__(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return input ids (T,) int64 and labels (T,) int64 of one window. Raises IndexError past the end."""
        input_ids, labels = self._rows(self._checked([index]))
        return input_ids[0], labels[0]

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input ids (B, T) int64 and labels (B, T) int64 of the windows asked for, in their order.

        Labels that do not count (padding, begin of text) are ``IGNORE_INDEX``. Raises IndexError past the end.
        """
        input_ids, labels = self._rows(self._checked(indices))
        return torch.from_numpy(input_ids), torch.from_numpy(labels)

    def describe(self, index: int) -> str:
        """Return in words which documents window ``index`` holds. Raises IndexError past the end."""
        start, end = (int(bound[0]) for bound in self._spans(self._checked([index])))
        end = min(end, start + self.seq_len + 1)
        first, last = (int(d) for d in np.searchsorted(self._starts, [start, end - 1], side="right") - 1)
        names = self.store.names
        if first == last:
            inside = start - int(self._starts[first])
            length = int(self._starts[first + 1] - self._starts[first])
            return f"window {index}: {names[first]}, tokens {inside} to {inside + end - start - 1} of {length}"
        between = f" and {last - first - 1} more between them" if last - first > 1 else ""
        return f"window {index}: from {names[first]} to {names[last]}{between}"

    def _checked(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        wanted = np.asarray(indices, dtype=np.int64)
        # Raised here because numpy would read a negative number from the end and give a window twice.
        outside = wanted[(wanted < 0) | (wanted >= self._n_windows)]
        if outside.size:
            raise IndexError(f"window {int(outside[0])} of {self._n_windows}")
        return wanted

    def _spans(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where each window starts in the joined stream, and where what it may show ends (exclusive)."""
        if self.pack:
            return indices * self.seq_len, np.broadcast_to(self._starts[-1:], indices.shape)
        document = np.searchsorted(self._first_window, indices, side="right") - 1
        within = indices - self._first_window[document]
        return self._starts[document] + within * self.seq_len, self._starts[document + 1]

    def _rows(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        start, end = self._spans(indices)
        at = start[:, None] + self._columns
        is_padding = at >= end[:, None]
        # Padding reads the last id it may and is overwritten below; it must not read past the stream.
        np.minimum(at, end[:, None] - 1, out=at)
        document = self._documents_at(at)
        inside = at - self._starts[document]
        is_bos = inside == 0
        is_eos = at == self._starts[document + 1] - 1
        ids = np.full(at.shape, self.pad_id, dtype=np.int64)
        ids[is_bos] = self.bos_id
        ids[is_eos] = self.eos_id
        is_text = ~(is_bos | is_eos)
        ids[is_text] = self._take((self.store.offsets[document] + inside - 1)[is_text])
        ids[is_padding] = self.pad_id
        # Told by place, not by id: a foreign tokenizer may give padding and end of text the same id.
        labels = np.where((is_padding | is_bos)[:, 1:], IGNORE_INDEX, ids[:, 1:])
        return np.ascontiguousarray(ids[:, :-1]), labels

    def _documents_at(self, at: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the document each place of the stream (B, T + 1) belongs to."""
        first = np.searchsorted(self._starts, at[:, 0], side="right") - 1
        last = np.searchsorted(self._starts, at[:, -1], side="right") - 1
        if np.array_equal(first, last):
            return np.broadcast_to(first[:, None], at.shape)
        return np.searchsorted(self._starts, at.ravel(), side="right").reshape(at.shape) - 1

    def _take(self, at: NDArray[np.int64]) -> NDArray[Any]:
        taken: NDArray[Any] = self.store.tokens[at]
        return taken

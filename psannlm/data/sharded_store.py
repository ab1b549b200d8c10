"""Token store over the shards of a split: one stream, read from memory-mapped files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psannlm.data.framing import unpack_origin
from psannlm.data.shard_file import Shard


class ShardedTokens:
    """A ``stream.Stream`` over shards in order. ``source_paths``: the sources that origins refer to.

    Every method raises ArtifactError if a shard is damaged.
    """

    def __init__(self, shards: Sequence[Shard], source_paths: Sequence[str]) -> None:
        # An empty shard has no positions, and would make the searches below ambiguous.
        self.segments = tuple(shard for shard in shards if shard.n_documents)
        self._source_paths = source_paths
        self._first_position = [0, *accumulate(shard.n_framed_tokens for shard in self.segments)]
        self._first_document = [0, *accumulate(shard.n_documents for shard in self.segments)]

    @property
    def n_framed_tokens(self) -> int:
        """Number of ids of all documents, including BOS and EOS."""
        return self._first_position[-1]

    @property
    def n_documents(self) -> int:
        """Number of documents, including empty ones."""
        return self._first_document[-1]

    @property
    def n_tokens(self) -> int:
        """Number of ids of the texts, without BOS and EOS."""
        return self.n_framed_tokens - 2 * self.n_documents

    @property
    def n_bytes(self) -> int:
        """Number of UTF-8 bytes of all texts."""
        return sum(shard.entry.text_bytes for shard in self.segments)

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Return a slice of the stream: a view within one shard, else a copy."""
        first = bisect_right(self._first_position, start) - 1
        if stop <= self._first_position[first + 1]:
            base = self._first_position[first]
            return self.segments[first].tokens(start - base, stop - base)
        return np.concatenate([shard.tokens(a, b) for shard, _, a, b in self._spans(self._first_position, start, stop)])

    def starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the starts of documents; that after the last is the end of the stream."""
        starts = [
            self._first_position[number] + shard.starts(a, b)
            for shard, number, a, b in self._spans(self._first_document, start, min(stop, self.n_documents))
        ]
        if stop > self.n_documents:
            starts.append(np.array([self.n_framed_tokens], dtype=np.int64))
        return np.concatenate(starts) if starts else np.zeros(0, dtype=np.int64)

    def documents_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the document at each position, in the shape of ``positions``."""
        of_shard = np.searchsorted(self._first_position, positions, side="right") - 1
        found = np.empty(positions.shape, dtype=np.int64)
        for number in np.unique(of_shard):
            is_here = of_shard == number
            local = self.segments[number].documents_at(positions[is_here] - self._first_position[number])
            found[is_here] = self._first_document[number] + local
        return found

    def length_counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the distinct framed lengths of documents, ascending, and the number of each."""
        tables = [shard.length_counts() for shard in self.segments]
        every = np.concatenate([lengths for lengths, _ in tables]) if tables else np.zeros(0, dtype=np.int64)
        lengths, index = np.unique(every, return_inverse=True)
        counts = np.zeros(len(lengths), dtype=np.int64)
        if tables:
            np.add.at(counts, index, np.concatenate([counts for _, counts in tables]))
        return lengths, counts

    def name(self, document: int) -> str:
        """Return ``path`` of the source, or ``path:record``."""
        number = bisect_right(self._first_document, document) - 1
        local = document - self._first_document[number]
        source, record = unpack_origin(int(self.segments[number].origins(local, local + 1)[0]))
        path = self._source_paths[source] if source < len(self._source_paths) else f"source {source}"
        return f"{path}:{record}" if record else path

    def _spans(self, firsts: list[int], start: int, stop: int) -> list[tuple[Shard, int, int, int]]:
        """Return (shard, its number, local start, local stop) for all shards that ``start`` to ``stop`` reach into."""
        found = []
        number = bisect_right(firsts, start) - 1
        while start < stop:
            here = min(stop, firsts[number + 1])
            found.append((self.segments[number], number, start - firsts[number], here - firsts[number]))
            start, number = here, number + 1
        return found

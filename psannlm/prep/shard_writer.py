"""Batches of selected documents, in reading order, from which shards are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from psannlm.data.framing import DocumentBatch
from psannlm.prep.chunks import ENDS
from psannlm.prep.encoded_chunk import read_encoded_chunk
from psannlm.prep.selection import Selection


class Units(NamedTuple):
    """Consecutive units, (n,) of ``encoded_chunk.UNIT``, and their tokens."""

    table: NDArray[Any]
    tokens: NDArray[Any]


def select_units(paths: Iterable[Path], selection: Selection, split: str) -> Iterator[Units]:
    """Yield the units of all documents of one split, chunk by chunk.

    Raises:
        ArtifactError: an encoded chunk is missing or damaged.
    """
    number = 0  # of the document that the next unit belongs to
    for path in paths:
        encoded = read_encoded_chunk(path)
        ends = encoded.ends
        n_ended = int(ends.sum())
        is_there = selection.masks(number, encoded.units["hash"][ends])[split]
        # The hash of a document that continues in the next encoded chunk is stored there.
        is_there = np.append(is_there, selection.spanning.get(number + n_ended) == split)
        wanted = is_there[np.cumsum(ends) - ends]
        # A chunk of blank text has no units.
        if wanted.size and wanted.all():
            yield Units(encoded.units, encoded.tokens)
        elif wanted.any():
            yield Units(encoded.units[wanted], encoded.tokens[np.repeat(wanted, encoded.units["n_tokens"])])
        number += n_ended


class DocumentStream:
    """Cuts a stream of units at the ends of documents."""

    def __init__(self, units: Iterator[Units]) -> None:
        self._units = units
        self._rest: Units | None = None
        self._n_tokens = self._n_bytes = 0  # so far, of a document that ends in later units

    def take(self, n_documents: int) -> Iterator[DocumentBatch]:
        """Yield the next ``n_documents`` in batches; exhaust the iterator before calling this again."""
        while n_documents:
            units = self._rest if self._rest is not None else next(self._units)
            self._rest = None
            ended = np.cumsum((units.table["flags"] & ENDS) > 0)
            if ended[-1] >= n_documents:
                stop = int(np.searchsorted(ended, n_documents)) + 1
                at = int(units.table["n_tokens"][:stop].sum())
                if stop < len(units.table):
                    self._rest = Units(units.table[stop:], units.tokens[at:])
                units = Units(units.table[:stop], units.tokens[:at])
            batch = self._batch(units)
            n_documents -= len(batch.lengths)
            yield batch

    def _batch(self, units: Units) -> DocumentBatch:
        table = units.table
        last = np.flatnonzero(table["flags"] & ENDS)
        tokens = np.cumsum(table["n_tokens"], dtype=np.int64)
        n_bytes = np.cumsum(table["n_bytes"], dtype=np.int64)
        batch = DocumentBatch(
            units.tokens,
            np.diff(tokens[last], prepend=-self._n_tokens),
            np.diff(n_bytes[last], prepend=-self._n_bytes),
            table["hash"][last],
            table["origin"][last].astype(np.int64),
        )
        before = (tokens[last[-1]], n_bytes[last[-1]]) if len(last) else (-self._n_tokens, -self._n_bytes)
        self._n_tokens, self._n_bytes = int(tokens[-1] - before[0]), int(n_bytes[-1] - before[1])
        return batch

"""Pieces and a selection enter; documents leave in reading order, as the batches that shards are written from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from psannlm.data.framing import DocumentBatch
from psannlm.prep.chunks import ENDS
from psannlm.prep.encoded_chunk import read_piece
from psannlm.prep.selection import Selection


class Units(NamedTuple):
    """Some units in a row, (n,) of ``piece.UNIT``, and their tokens."""

    table: NDArray[Any]
    tokens: NDArray[Any]


def select_units(paths: Iterable[Path], selection: Selection, side: str) -> Iterator[Units]:
    """Yield the units of all documents on one side, piece by piece.

    Raises:
        ArtifactError: a piece is missing or damaged.
    """
    number = 0  # of the document that the next unit belongs to
    for path in paths:
        piece = read_piece(path)
        ends = piece.ends
        n_ended = int(ends.sum())
        is_there = selection.sides(number, piece.units["hash"][ends])[side]
        # The document that goes on in the next piece shows its hash there.
        is_there = np.append(is_there, selection.spanning.get(number + n_ended) == side)
        wanted = is_there[np.cumsum(ends) - ends]
        if wanted.all():
            yield Units(piece.units, piece.tokens)
        elif wanted.any():
            yield Units(piece.units[wanted], piece.tokens[np.repeat(wanted, piece.units["n_tokens"])])
        number += n_ended


class DocumentStream:
    """Cuts a stream of units where documents end."""

    def __init__(self, units: Iterator[Units]) -> None:
        self._units = units
        self._rest: Units | None = None
        self._n_tokens = self._n_bytes = 0  # so far, of a document that later units end

    def take(self, n_documents: int) -> Iterator[DocumentBatch]:
        """Yield the next ``n_documents``; the iterator must be used up before the next one is asked for."""
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

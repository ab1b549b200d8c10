"""The pieces of a corpus enter; which documents stay, which are held out, and how they fill shards leaves.

Only the heads of pieces are read, and one at a time: nothing held here but a bit for each document grows with the
corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psannlm.data.framing import RECORD_BITS, unpack_origin
from psannlm.data.split import draws
from psannlm.errors import CorpusError
from psannlm.prep.chunks import HALF, HAS_TEXT
from psannlm.prep.dedup import Bits, DuplicateFinder
from psannlm.prep.encode_worker import too_long, too_short
from psannlm.prep.encoded_chunk import read_piece
from psannlm.prep.job import PrepSettings
from psannlm.prep.reader import Drops
from psannlm.tokenizers.roundtrip import LossMeter

TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)


@dataclass(frozen=True)
class Documents:
    """The documents that end in one piece; ``first`` is the number of the first of them in the whole corpus.

    ``spans``: the first of them begins in an earlier piece.
    ``n_tokens``, ``n_bytes``, ``n_chars``, ``origins``: (n,) int64. ``has_text``: (n,) bool. ``hashes``: (n, 16) uint8.
    ``is_half``: (n,) bool, halves of the document that a corpus of one was cut in.
    """

    first: int
    spans: bool
    n_tokens: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    n_chars: NDArray[np.int64]
    has_text: NDArray[np.bool_]
    origins: NDArray[np.int64]
    hashes: NDArray[np.uint8]
    is_half: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.n_tokens)

    @property
    def numbers(self) -> NDArray[np.int64]:
        """Their numbers in the whole corpus, (n,)."""
        return np.arange(self.first, self.first + len(self), dtype=np.int64)


def read_documents(paths: Sequence[Path], facts: Callable[[Any], None] | None = None) -> Iterator[Documents]:
    """Yield the documents of pieces in order; ``facts`` gets what each piece counted.

    Raises:
        ArtifactError: a piece is missing or damaged.
    """
    open_so_far = np.zeros(4, np.int64)  # of a document that a later piece ends
    first = 0
    for path in paths:
        piece = read_piece(path, with_tokens=False)
        if facts is not None:
            facts(piece.facts)
        units = piece.units
        sums = np.cumsum(
            np.stack(
                [units["n_tokens"], units["n_bytes"], units["n_chars"], (units["flags"] & HAS_TEXT) > 0], axis=1
            ).astype(np.int64),
            axis=0,
        )
        last = np.flatnonzero(piece.ends)
        spans = len(last) > 0 and not piece.begins[0]
        each = np.diff(sums[last], axis=0, prepend=-open_so_far[None])
        if len(last):
            open_so_far = sums[-1] - sums[last[-1]]
        elif len(units):
            open_so_far = open_so_far + sums[-1]
        yield Documents(
            first,
            spans,
            each[:, 0],
            each[:, 1],
            each[:, 2],
            each[:, 3] > 0,
            units["origin"][last].astype(np.int64),
            units["hash"][last],
            (units["flags"][last] & HALF) > 0,
        )
        first += len(last)


@dataclass
class ShardSize:
    """What one shard will hold."""

    n_documents: int = 0
    n_tokens: int = 0
    n_bytes: int = 0


class ShardPlan:
    """Documents in order fill shards of at most ``limit`` tokens; one that is larger has a shard of its own."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.shards: list[ShardSize] = []

    def add(self, n_tokens: NDArray[np.int64], n_bytes: NDArray[np.int64]) -> None:
        """Place the next documents."""
        tokens = np.concatenate([[0], np.cumsum(n_tokens)])
        n_bytes_before = np.concatenate([[0], np.cumsum(n_bytes)])
        at = 0
        while at < len(n_tokens):
            shard = self.shards[-1] if self.shards else None
            room = self._limit - shard.n_tokens if shard else -1
            stop = int(np.searchsorted(tokens, tokens[at] + room, side="right")) - 1
            if shard is None or stop <= at:
                shard = ShardSize()
                self.shards.append(shard)
                fits = int(np.searchsorted(tokens, tokens[at] + self._limit, side="right")) - 1
                stop = max(at + 1, fits)
            shard.n_documents += stop - at
            shard.n_tokens += int(tokens[stop] - tokens[at])
            shard.n_bytes += int(n_bytes_before[stop] - n_bytes_before[at])
            at = stop

    @property
    def total(self) -> ShardSize:
        """All shards together."""
        return ShardSize(
            sum(shard.n_documents for shard in self.shards),
            sum(shard.n_tokens for shard in self.shards),
            sum(shard.n_bytes for shard in self.shards),
        )


@dataclass
class Selection:
    """Which documents stay, and where.

    ``moved`` are numbers whose side is another than the one they drew; ``spanning`` holds the sides (None: left out) of
    those that begin in one piece and end in another, since a hash comes with the end. ``documents_of``: how many stay
    of each source, (n_sources,) int64.
    """

    settings: PrepSettings
    dropped: Bits
    plans: dict[str, ShardPlan]
    documents_of: NDArray[np.int64]
    n_duplicates: int = 0
    moved: set[int] = field(default_factory=set)
    spanning: dict[int, str | None] = field(default_factory=dict)

    def sides(self, first: int, hashes: NDArray[np.uint8]) -> dict[str, NDArray[np.bool_]]:
        """Return which of the documents from number ``first`` on, (n, 16) hashes, stay on either side, each (n,)."""
        is_kept = ~self.dropped.among(first, first + len(hashes))
        is_held_out = draws(hashes, self.settings.seed) < self.settings.val_split
        for number in self.moved:
            if 0 <= number - first < len(hashes):
                is_held_out[number - first] ^= True
        return {TRAIN: is_kept & ~is_held_out, VALIDATION: is_kept & is_held_out}


@dataclass(frozen=True)
class OnlyOne:
    """The corpus is a single document, to be cut in two: where it came from and how long it is."""

    origin: int
    n_bytes: int


class Surveyor:
    """Looks through the pieces of a corpus of ``n_sources`` files; ``name(source, record)`` names a record.

    ``is_cut``: the corpus is one document in two halves; ``is_part``: others prepare the rest, so that nothing is
    decided here that takes all documents to decide.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        folder: Path,
        settings: PrepSettings,
        n_sources: int,
        name: Callable[[int, int], str],
        drops: Drops,
        *,
        is_cut: bool = False,
        is_part: bool = False,
    ) -> None:
        self.drops = drops
        self.byte_order_marks = 0
        self.replaced_bytes = 0
        self.replaced_surrogates = 0
        self.replaced_in: list[str] = []
        self.meter = LossMeter()
        self.lost: tuple[str, str] | None = None  # of the first document that the tokenizer does not give back
        self._paths, self._folder, self._settings, self._n_sources = paths, folder, settings, n_sources
        self._name, self._is_cut, self._is_part = name, is_cut, is_part

    def select(self) -> Selection | OnlyOne:
        """Return what becomes of every document; counts what is left out on the way.

        Raises:
            ArtifactError: a piece is damaged.
            StorageError: there is no room to look for duplicates.
            CorpusError: the corpus is one document that is too short to be cut in two.
        """
        n, unwanted, repeated = self._count()
        dropped = Bits(n)
        if not self._settings.keep_duplicates and not self._is_cut:
            with DuplicateFinder(self._folder, n) as finder:
                for documents in read_documents(self._paths):
                    finder.add(documents.numbers, documents.hashes)
                dropped = finder.repeated()
        dropped.add(np.array(unwanted + repeated, np.int64))
        selection, extremes = self._plan(dropped, set())
        kept = {side: plan.total.n_documents for side, plan in selection.plans.items()}
        n_kept = sum(kept.values())
        n_duplicates = n - len(unwanted) - n_kept
        if self._settings.val_split > 0 and not self._is_part and n_kept:
            if self._is_cut:
                selection, _ = self._plan(dropped, self._halves())
            elif n_kept == 1:
                return OnlyOne(extremes.origin, kept_bytes(selection))
            elif not kept[VALIDATION] or not kept[TRAIN]:
                moved = extremes.lowest if not kept[VALIDATION] else extremes.highest
                selection, _ = self._plan(dropped, {moved})
        selection.n_duplicates = n_duplicates
        return selection

    def _count(self) -> tuple[int, list[int], list[int]]:
        """Return how many documents there are, and the numbers of long ones that the filters leave out.

        And where the single document of the corpus is cut, the numbers of its repetitions: nothing else was left.
        """
        unwanted: list[int] = []
        repeated: list[int] = []
        n = 0
        settings = self._settings
        for documents in read_documents(self._paths, self._note):
            n += len(documents)
            self._refuse_blank_half(documents)
            # What a worker saw whole it has filtered; these are the documents whose parts went to several.
            limit = np.inf if settings.max_chars is None else settings.max_chars
            has_text = documents.has_text & ~documents.is_half
            reasons = (
                ("blank document", ~documents.has_text),
                (too_short(settings), has_text & (documents.n_chars < settings.min_chars)),
                (too_long(settings) if settings.max_chars else "", has_text & (documents.n_chars > limit)),
            )
            for reason, is_out in reasons:
                for at in np.flatnonzero(is_out).tolist():
                    unwanted.append(documents.first + at)
                    self.drops.add(reason, self._name(*unpack_origin(int(documents.origins[at]))))
            if self._is_cut:
                others = documents.first + np.flatnonzero(~documents.is_half)
                repeated += sorted({*others.tolist()} - {*unwanted})
        return n, unwanted, repeated

    def _refuse_blank_half(self, documents: Documents) -> None:
        for at in np.flatnonzero(documents.is_half & ~documents.has_text)[:1].tolist():
            name = self._name(*unpack_origin(int(documents.origins[at])))
            raise CorpusError(
                f"{name}: too little text to hold out {self._settings.val_split:g} of it; add text, or give "
                "--val-split 0"
            )

    def _note(self, facts: Any) -> None:
        for reason, (count, where) in facts["drops"].items():
            self.drops.merge(reason, count, [self._name(source, record) for source, record in where])
        self.byte_order_marks += facts["byte_order_marks"]
        self.replaced_bytes += facts["replaced_bytes"]
        self.replaced_surrogates += facts.get("replaced_surrogates", 0)  # a piece of an earlier version has none
        self.replaced_in += [self._name(source, record) for source, record in facts["replaced_in"]]
        del self.replaced_in[6:]
        # Pieces of an earlier version did not count what they checked.
        self.meter.checked_bytes += facts.get("checked_bytes", 0)
        self.meter.lost_bytes += facts.get("lost_bytes", len(facts["lost"]))
        if self.lost is None and facts["lost"]:
            source, record, loss = facts["lost"][0]
            self.lost = self._name(source, record), loss

    def _plan(self, dropped: Bits, moved: set[int]) -> tuple[Selection, _Extremes]:
        plans = {side: ShardPlan(self._settings.shard_tokens) for side in SPLITS}
        documents_of = np.zeros(self._n_sources, np.int64)
        selection = Selection(self._settings, dropped, plans, documents_of, 0, moved)
        extremes = _Extremes()
        for documents in read_documents(self._paths):
            sides = selection.sides(documents.first, documents.hashes)
            if documents.spans:
                there = [side for side in SPLITS if sides[side][0]]
                selection.spanning[documents.first] = there[0] if there else None
            for side, is_there in sides.items():
                plans[side].add(documents.n_tokens[is_there], documents.n_bytes[is_there])
            is_kept = sides[TRAIN] | sides[VALIDATION]
            documents_of += np.bincount(documents.origins[is_kept] >> RECORD_BITS, minlength=self._n_sources)
            extremes.look(documents, is_kept, self._settings.seed)
        return selection, extremes

    def _halves(self) -> set[int]:
        """Return the numbers to move so that the first half is for training and the second is held out."""
        halves = [
            (documents.first + at, bool(is_out[at]))
            for documents in read_documents(self._paths)
            for is_out in [draws(documents.hashes, self._settings.seed) < self._settings.val_split]
            for at in np.flatnonzero(documents.is_half).tolist()
        ]
        return {number for place, (number, is_out) in enumerate(halves) if is_out != (place > 0)}


class _Extremes:
    """The documents that drew the lowest and the highest number, the first of equals; for corpora of few documents."""

    def __init__(self) -> None:
        self.lowest = self.highest = self.origin = -1
        self._low, self._high = 2.0, -1.0

    def look(self, documents: Documents, is_kept: NDArray[np.bool_], seed: int) -> None:
        drawn = draws(documents.hashes, seed)
        at = np.flatnonzero(is_kept)
        if not len(at):
            return
        low, high = int(at[np.argmin(drawn[at])]), int(at[np.argmax(drawn[at])])
        if drawn[low] < self._low:
            self.lowest, self._low = documents.first + low, float(drawn[low])
            self.origin = int(documents.origins[low])
        if drawn[high] > self._high:
            self.highest, self._high = documents.first + high, float(drawn[high])


def kept_bytes(selection: Selection) -> int:
    """Return the bytes of all documents that stay."""
    return sum(plan.total.n_bytes for plan in selection.plans.values())

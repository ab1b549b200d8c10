"""Selection of documents: filters, duplicates, the train/validation split, and the sizes of shards.

Only the heads of encoded chunks are read, one at a time: memory grows with the corpus by one bit per document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psannlm.data.framing import RECORD_BITS, unpack_origin
from psannlm.data.split import uniform_from_hash
from psannlm.errors import CorpusError
from psannlm.prep.chunks import HALF, HAS_TEXT
from psannlm.prep.dedup import Bits, DuplicateFinder
from psannlm.prep.encode_worker import too_long, too_short
from psannlm.prep.encoded_chunk import read_encoded_chunk
from psannlm.prep.job import PrepSettings
from psannlm.prep.reader import Drops
from psannlm.tokenizers.roundtrip import RoundTripMeter

TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)


@dataclass(frozen=True)
class Documents:
    """The documents that end in one encoded chunk; ``first`` is the number of the first one in the whole corpus.

    ``spans``: the first of them begins in an earlier encoded chunk.
    ``n_tokens``, ``n_bytes``, ``n_chars``, ``origins``: (n,) int64. ``has_text``: (n,) bool. ``hashes``: (n, 16) uint8.
    ``is_half``: (n,) bool, the two halves of the only document of a corpus.
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
        """Numbers of the documents in the whole corpus, (n,)."""
        return np.arange(self.first, self.first + len(self), dtype=np.int64)


def read_documents(paths: Sequence[Path], facts: Callable[[Any], None] | None = None) -> Iterator[Documents]:
    """Yield the documents of encoded chunks in order; ``facts`` is called with the counts of each encoded chunk.

    Raises:
        ArtifactError: an encoded chunk is missing or damaged.
    """
    open_so_far = np.zeros(4, np.int64)  # of a document that ends in a later encoded chunk
    first = 0
    for path in paths:
        encoded = read_encoded_chunk(path, with_tokens=False)
        if facts is not None:
            facts(encoded.facts)
        units = encoded.units
        sums = np.cumsum(
            np.stack(
                [units["n_tokens"], units["n_bytes"], units["n_chars"], (units["flags"] & HAS_TEXT) > 0], axis=1
            ).astype(np.int64),
            axis=0,
        )
        last = np.flatnonzero(encoded.ends)
        spans = len(last) > 0 and not encoded.begins[0]
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
    """Planned content of one shard."""

    n_documents: int = 0
    n_tokens: int = 0
    n_bytes: int = 0


class ShardPlan:
    """Distribution of documents over shards of at most ``limit`` tokens; a longer document has a shard of its own."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.shards: list[ShardSize] = []

    def add(self, n_tokens: NDArray[np.int64], n_bytes: NDArray[np.int64]) -> None:
        """Assign the next documents to shards."""
        tokens = np.concatenate([[0], np.cumsum(n_tokens)])
        n_bytes_before = np.concatenate([[0], np.cumsum(n_bytes)])
        at = 0
        while at < len(n_tokens):
            shard = self.shards[-1] if self.shards else None
            free = self._limit - shard.n_tokens if shard else -1
            stop = int(np.searchsorted(tokens, tokens[at] + free, side="right")) - 1
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
        """Sum over all shards."""
        return ShardSize(
            sum(shard.n_documents for shard in self.shards),
            sum(shard.n_tokens for shard in self.shards),
            sum(shard.n_bytes for shard in self.shards),
        )


@dataclass
class Selection:
    """The documents that are kept, and the split of each.

    ``moved``: numbers of documents that are moved to the other split. ``spanning``: split (None: left out) of the
    documents that begin in one encoded chunk and end in another, because the hash is stored with the end.
    ``documents_of``: number of documents kept from each source, (n_sources,) int64.
    """

    settings: PrepSettings
    dropped: Bits
    plans: dict[str, ShardPlan]
    documents_of: NDArray[np.int64]
    n_duplicates: int = 0
    moved: set[int] = field(default_factory=set)
    spanning: dict[int, str | None] = field(default_factory=dict)

    def masks(self, first: int, hashes: NDArray[np.uint8]) -> dict[str, NDArray[np.bool_]]:
        """Return the (n,) mask of each split, for the documents from number ``first`` on with ``hashes``, (n, 16)."""
        is_kept = ~self.dropped.among(first, first + len(hashes))
        is_held_out = uniform_from_hash(hashes, self.settings.seed) < self.settings.val_split
        for number in self.moved:
            if 0 <= number - first < len(hashes):
                is_held_out[number - first] ^= True
        return {TRAIN: is_kept & ~is_held_out, VALIDATION: is_kept & is_held_out}


@dataclass(frozen=True)
class SingleDocument:
    """The corpus is a single document, which must be cut in two: its origin and length."""

    origin: int
    n_bytes: int


class DocumentSelector:
    """Selects documents from the encoded chunks of ``n_sources`` files; ``name(source, record)`` names a record.

    ``is_cut``: the corpus is one document in two halves. ``is_part``: this is one of several parts, so that decisions
    that need all documents are left to the merge.
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
        self.meter = RoundTripMeter()
        self.roundtrip_error: tuple[str, str] | None = None  # name of the first such document, and the difference
        self._paths, self._folder, self._settings, self._n_sources = paths, folder, settings, n_sources
        self._name, self._is_cut, self._is_part = name, is_cut, is_part

    def select(self) -> Selection | SingleDocument:
        """Select documents, and count those that are left out.

        Raises:
            ArtifactError: an encoded chunk is damaged.
            StorageError: the disk is full.
            CorpusError: the corpus is a single document that is too short to be cut in two.
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
        kept = {split: plan.total.n_documents for split, plan in selection.plans.items()}
        n_kept = sum(kept.values())
        n_duplicates = n - len(unwanted) - n_kept
        if self._settings.val_split > 0 and not self._is_part and n_kept:
            if self._is_cut:
                selection, _ = self._plan(dropped, self._halves())
            elif n_kept == 1:
                return SingleDocument(extremes.origin, kept_bytes(selection))
            elif not kept[VALIDATION] or not kept[TRAIN]:
                moved = extremes.lowest if not kept[VALIDATION] else extremes.highest
                selection, _ = self._plan(dropped, {moved})
        selection.n_duplicates = n_duplicates
        return selection

    def _count(self) -> tuple[int, list[int], list[int]]:
        """Return the number of documents, the numbers of long documents that filters leave out, and of repetitions.

        Repetitions are listed only where the single document of the corpus is cut: all other documents repeat it.
        """
        unwanted: list[int] = []
        repeated: list[int] = []
        n = 0
        settings = self._settings
        for documents in read_documents(self._paths, self._note):
            n += len(documents)
            self._refuse_blank_half(documents)
            # Workers filter the documents that they see whole; here are those whose segments went to several workers.
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
        self.replaced_surrogates += facts.get("replaced_surrogates", 0)  # absent in earlier versions
        self.replaced_in += [self._name(source, record) for source, record in facts["replaced_in"]]
        del self.replaced_in[6:]
        # Encoded chunks of earlier versions lack the number of checked bytes.
        self.meter.checked_bytes += facts.get("checked_bytes", 0)
        self.meter.lost_bytes += facts.get("lost_bytes", len(facts["lost"]))
        if self.roundtrip_error is None and facts["lost"]:
            source, record, error = facts["lost"][0]
            self.roundtrip_error = self._name(source, record), error

    def _plan(self, dropped: Bits, moved: set[int]) -> tuple[Selection, _Extremes]:
        plans = {split: ShardPlan(self._settings.shard_tokens) for split in SPLITS}
        documents_of = np.zeros(self._n_sources, np.int64)
        selection = Selection(self._settings, dropped, plans, documents_of, 0, moved)
        extremes = _Extremes()
        for documents in read_documents(self._paths):
            masks = selection.masks(documents.first, documents.hashes)
            if documents.spans:
                there = [split for split in SPLITS if masks[split][0]]
                selection.spanning[documents.first] = there[0] if there else None
            for split, is_there in masks.items():
                plans[split].add(documents.n_tokens[is_there], documents.n_bytes[is_there])
            is_kept = masks[TRAIN] | masks[VALIDATION]
            documents_of += np.bincount(documents.origins[is_kept] >> RECORD_BITS, minlength=self._n_sources)
            extremes.update(documents, is_kept, self._settings.seed)
        return selection, extremes

    def _halves(self) -> set[int]:
        """Return the numbers to move so that the first half is training text and the second is held out."""
        halves = [
            (documents.first + at, bool(is_out[at]))
            for documents in read_documents(self._paths)
            for is_out in [uniform_from_hash(documents.hashes, self._settings.seed) < self._settings.val_split]
            for at in np.flatnonzero(documents.is_half).tolist()
        ]
        return {number for index, (number, is_out) in enumerate(halves) if is_out != (index > 0)}


class _Extremes:
    """The documents with the lowest and the highest hash number, the first of equals; for corpora of few documents."""

    def __init__(self) -> None:
        self.lowest = self.highest = self.origin = -1
        self._low, self._high = 2.0, -1.0

    def update(self, documents: Documents, is_kept: NDArray[np.bool_], seed: int) -> None:
        drawn = uniform_from_hash(documents.hashes, seed)
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
    """Return the bytes of all documents that are kept."""
    return sum(plan.total.n_bytes for plan in selection.plans.values())

"""Mixture of sources: how many training windows of each source an epoch has, and which.

Windows are cut from the stream of all sources in their order, so that those of a source are neighbours; a window that
two sources share counts for the one it begins in. An epoch has as many windows as the stream, of which source i has the
share that its weight asks for. Passes over a source follow each other without regard to epochs: a small source is
repeated within an epoch, and a large one is continued in the next. Every pass has an order of its own. Which window is
at which place is a pure function of (seed, epoch, place).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psannlm.data.order import permuted, permuted_at
from psannlm.data.windows import Windows
from psannlm.errors import ConfigError, Problem


@dataclass(frozen=True)
class Mixture:
    """Windows of each source in the stream and in an epoch.

    Source i has the windows ``bounds[i]`` to ``bounds[i + 1]`` (exclusive), and ``counts[i]`` places in every epoch.
    """

    bounds: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, windows: Windows, first_documents: Sequence[int], weights: Sequence[float]) -> Mixture:
        """Return the mixture in which the sources' shares of the labels are as ``weights``, which need not sum to 1.

        ``first_documents[i]`` is the first document of source i in the stream of ``windows``.

        Raises:
            ConfigError: a source has no window, or too small a weight for a single window in an epoch.
        """
        bounds, labels = _sizes(windows, first_documents)
        sizes = np.diff(bounds)
        if (empty := np.flatnonzero((sizes <= 0) | (labels <= 0))).size:
            raise _problem(int(empty[0]), "the source has less than one window of training text; add text or remove it")
        # Without packing, sources differ in labels per window, and the weights are shares of labels.
        wanted = np.asarray(weights, dtype=np.float64) * sizes / labels
        counts = _rounded(wanted / wanted.sum() * len(windows), len(windows))
        if (empty := np.flatnonzero(counts == 0)).size:
            index = int(empty[0])
            message = (
                f"weight {weights[index]:g} is less than one of the {len(windows):,} windows of an epoch; raise it"
            )
            raise _problem(index, message)
        return cls(tuple(bounds.tolist()), tuple(counts.tolist()))

    @property
    def repeats(self) -> tuple[float, ...]:
        """How often an epoch passes over each source."""
        sizes = np.diff(self.bounds).tolist()
        return tuple(count / size for count, size in zip(self.counts, sizes, strict=True))

    def order(self, epoch: int, start: int, stop: int, seed: int) -> NDArray[np.int64]:
        """Return the windows at places ``start`` to ``stop`` of ``epoch``, (stop - start,) int64."""
        places = permuted(sum(self.counts), start, stop, seed, "epoch", epoch)
        firsts = np.concatenate([[0], np.cumsum(self.counts)])
        sources = np.searchsorted(firsts, places, side="right") - 1
        found = np.empty_like(places)
        for source in np.unique(sources).tolist():
            is_of_source = sources == source
            size = self.bounds[source + 1] - self.bounds[source]
            drawn = epoch * self.counts[source] + places[is_of_source] - firsts[source]
            passes = drawn // size
            windows = np.empty_like(drawn)
            for number in np.unique(passes).tolist():
                is_in_pass = passes == number
                within = permuted_at(size, drawn[is_in_pass] % size, seed, f"source {source}", number)
                windows[is_in_pass] = within
            found[is_of_source] = self.bounds[source] + windows
        return found

    def count(self, windows: NDArray[np.int64]) -> tuple[int, ...]:
        """Return how many of ``windows`` are of each source."""
        sources = np.searchsorted(self.bounds, windows, side="right") - 1
        return tuple(np.bincount(sources, minlength=len(self.counts)).tolist())


def _sizes(windows: Windows, first_documents: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first window of each source and the number of windows, (n + 1,), and the labels of each, (n,)."""
    store, seq_len = windows.store, windows.seq_len
    starts = store.starts(0, store.n_documents + 1)
    edges = np.array([*first_documents, store.n_documents])
    # BOS is not a label.
    labels_before = starts - np.arange(len(starts))
    if windows.is_packed:
        before = np.minimum(-(-starts // seq_len), len(windows))
        before[-1] = len(windows)
    else:
        before = np.concatenate([[0], np.cumsum(-(-(np.diff(starts) - 1) // seq_len))])
    return before[edges], np.diff(labels_before[edges])


def _rounded(wanted: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Round to whole numbers that sum to ``total``, none of them off by one or more: largest remainders first."""
    counts = np.floor(wanted).astype(np.int64)
    counts[np.argsort(counts - wanted, kind="stable")[: total - int(counts.sum())]] += 1
    return counts


def _problem(index: int, message: str) -> ConfigError:
    return ConfigError(Problem(f"data.sources[{index}].weight", message))

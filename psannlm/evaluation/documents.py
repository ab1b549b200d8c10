"""Losses of single held-out documents, and the bootstrap over documents of the difference between two models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from psannlm.data.windows import Windows
from psannlm.errors import CorpusError
from psannlm.kernels.cross_entropy import token_cross_entropy
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import Precision
from psannlm.runtime.progress import OnProgress, ProgressCounter, ignore_progress

N_RESAMPLES = 10_000
_TAIL = 0.025
# Document numbers drawn at once, which bounds memory: 8 MB of them, and as much again for each of the gathered values.
_MOST_DRAWN = 1 << 20


@dataclass(frozen=True)
class DocumentLosses:
    """Summed cross-entropy of each document in ``nats`` (N,) float64, and its number of labels (N,) int64.

    Labels are the tokens of the text and its EOS, as in ``loss.Evaluation``.
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]

    def loss(self, documents: NDArray[np.int64] | None = None) -> float:
        """Return the mean in nats per token over all documents, or over those numbered in ``documents``."""
        chosen = slice(None) if documents is None else documents
        return float(self.nats[chosen].sum() / self.tokens[chosen].sum())


@dataclass(frozen=True)
class DocumentDifference:
    """Difference in nats per token, with its bootstrap interval; None without at least two documents."""

    mean: float
    low: float | None
    high: float | None
    n_documents: int


@torch.no_grad()
def evaluate_documents(
    model: Transformer,
    windows: Windows,
    *,
    precision: Precision,
    batch_size: int = 16,
    on_progress: OnProgress = ignore_progress,
) -> DocumentLosses:
    """Return the losses of the documents of ``windows``, whose sum is the loss of ``loss.evaluate``.

    A document that shares a window with others is predicted from them too, unless ``windows`` isolates documents.
    ``model`` keeps its mode.

    Raises:
        CorpusError: the text has no tokens.
    """
    if windows.n_labels == 0:
        raise CorpusError("the text to evaluate on has no tokens; add text")
    was_training, device = model.training, precision.device
    model.eval()
    nats = np.zeros(windows.store.n_documents)
    count = ProgressCounter(on_progress, "evaluating", "windows", len(windows))
    try:
        for start in range(0, len(windows), batch_size):
            rows = range(start, min(start + batch_size, len(windows)))
            input_ids, labels = windows.batch(rows)
            positions = windows.document_positions(rows)
            with precision.autocast():
                hidden = model.hidden_states(
                    input_ids.to(device), document_positions=None if positions is None else positions.to(device)
                )
                losses = token_cross_entropy(hidden.flatten(0, 1), model.logits, labels.flatten().to(device))
            documents = windows.label_documents(rows).ravel()
            nats += np.bincount(documents, losses.double().cpu().numpy(), len(nats))
            count.at(rows.stop)
    finally:
        model.train(was_training)
    # BOS is the only id of a document that is not a label.
    starts = windows.store.starts(0, windows.store.n_documents + 1)
    return DocumentLosses(nats, np.diff(starts) - 1)


def bootstrap_difference(
    ours: Sequence[DocumentLosses],
    theirs: Sequence[DocumentLosses],
    *,
    seed: int = 0,
    n_resamples: int = N_RESAMPLES,
    documents: NDArray[np.int64] | None = None,
) -> DocumentDifference:
    """Return the difference of two models' losses on the same documents, with its 95 % interval over documents.

    Several runs of a model (seeds) are averaged, document by document. The percentile bootstrap (Efron 1979) draws as
    many documents as there are, with replacement, and takes the same ones for both models, so that how hard a document
    is cancels. A resample's difference is its summed nats over its tokens. What the interval leaves out is another
    training run. With fewer than about 20 documents it is too narrow.

    Args:
        documents: numbers of the documents that count; None: all.

    Raises:
        ValueError: the documents differ in number or length.
    """
    first = theirs[0].tokens
    if any(not np.array_equal(each.tokens, first) for each in (*ours, *theirs)):
        raise ValueError("the losses are not those of the same documents")
    chosen = slice(None) if documents is None else documents
    deltas = (np.mean([each.nats for each in ours], 0) - np.mean([each.nats for each in theirs], 0))[chosen]
    tokens = first[chosen].astype(np.float64)
    n, mean = len(deltas), float(deltas.sum() / tokens.sum())
    if n < 2:
        return DocumentDifference(mean, None, None, n)
    random = np.random.default_rng(seed)
    drawn = np.empty(n_resamples)
    at_once = max(1, _MOST_DRAWN // n)
    for start in range(0, n_resamples, at_once):
        rows = random.integers(0, n, (min(at_once, n_resamples - start), n))
        drawn[start : start + len(rows)] = deltas[rows].sum(1) / tokens[rows].sum(1)
    low, high = np.quantile(drawn, (_TAIL, 1 - _TAIL))
    return DocumentDifference(mean, float(low), float(high), n)

"""Losses of documents add up to the loss of the text; the bootstrap covers a known truth and pairs documents."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from psannlm.data.memory_store import store_from_ids
from psannlm.data.windows import Windows
from psannlm.evaluation.documents import DocumentLosses, bootstrap_difference, evaluate_documents
from psannlm.evaluation.loss import evaluate
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import Precision

FP32 = Precision(torch.device("cpu"), torch.float32, "fp32 as asked")
LENGTHS = [7, 0, 4, 12, 1, 5]


def windows_of(pack: bool = True, isolate: bool = False) -> Windows:
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(4, 17, (n,), generator=generator).tolist() for n in LENGTHS]
    store = store_from_ids(documents, 17, bos_id=1, eos_id=2, doc_bytes=[3 * n for n in LENGTHS])
    return Windows(store, 5, pad_id=0, pack=pack, isolate_documents=isolate)


@pytest.mark.parametrize(("pack", "isolate"), [(True, False), (True, True), (False, False)])
def test_document_losses_sum_to_loss_of_text(pack: bool, isolate: bool, build_tiny: Callable[..., Transformer]) -> None:
    model, windows = build_tiny(), windows_of(pack, isolate)
    found = evaluate_documents(model, windows, precision=FP32, batch_size=2)
    whole = evaluate(model, windows, precision=FP32)
    assert found.tokens.tolist() == [n + 1 for n in LENGTHS]
    assert found.nats.sum() == pytest.approx(whole.nats, rel=1e-6)
    assert found.loss() == pytest.approx(whole.loss, rel=1e-6)
    assert found.loss(np.array([0, 3])) == pytest.approx((found.nats[0] + found.nats[3]) / 21)


def test_document_losses_are_those_of_separate_documents(build_tiny: Callable[..., Transformer]) -> None:
    """Without packing, every document is predicted from its own text: window by window, in float64."""
    model, windows = build_tiny().double(), windows_of(pack=False)
    found = evaluate_documents(model, windows, precision=FP32, batch_size=100)
    starts = windows.store.starts(0, len(LENGTHS) + 1).tolist()
    for document, (begin, end) in enumerate(pairwise(starts)):
        ids, nats = torch.tensor(windows.store.tokens(begin, end).astype("int64")), 0.0
        for start in range(0, len(ids) - 1, windows.seq_len):
            part = ids[start : start + windows.seq_len + 1]
            with torch.no_grad():
                logits = model(part[None, :-1])[0]
            nats += float(F.cross_entropy(logits, part[1:], reduction="sum"))
        assert found.nats[document] == pytest.approx(nats, rel=1e-5)


def test_document_losses_of_shared_windows_follow_the_borders(build_tiny: Callable[..., Transformer]) -> None:
    """The label at position p of the stream counts for the document that holds p, and BOS for none."""
    model, windows = build_tiny(), windows_of()
    store, wanted = windows.store, np.zeros(len(LENGTHS))
    ids, owner = torch.tensor(store.tokens(0, store.n_framed_tokens).astype("int64")), []
    for document, length in enumerate(LENGTHS):
        owner += [document] * (length + 2)
    for start in range(0, len(ids) - 1, windows.seq_len):
        part = ids[start : start + windows.seq_len + 1]
        with torch.no_grad():
            losses = F.cross_entropy(model(part[None, :-1])[0], part[1:], reduction="none")
        for at, loss in enumerate(losses.tolist(), start + 1):
            wanted[owner[at]] += loss if at == 0 or owner[at] == owner[at - 1] else 0.0
    found = evaluate_documents(model, windows, precision=FP32, batch_size=3)
    assert found.nats == pytest.approx(wanted, rel=1e-5)


def losses_of(nats: np.ndarray, tokens: np.ndarray) -> DocumentLosses:
    return DocumentLosses(nats.astype(np.float64), tokens.astype(np.int64))


def test_bootstrap_interval_covers_known_difference() -> None:
    """500 data sets of 60 documents with a true difference of 0.02 nats per token: 95 % of intervals hold it."""
    random, n_covered = np.random.default_rng(5), 0
    for number in range(500):
        tokens = random.integers(20, 200, 60)
        base = tokens * random.normal(3.0, 0.5, 60)
        ours = base + tokens * (0.02 + random.normal(0, 0.05, 60))
        found = bootstrap_difference([losses_of(ours, tokens)], [losses_of(base, tokens)], seed=number, n_resamples=400)
        assert found.low is not None
        assert found.high is not None
        n_covered += found.low <= 0.02 <= found.high
    # The percentile interval of 60 documents covers 94 %; the binomial spread of 500 is 1.1 %.
    assert 0.90 < n_covered / 500 < 0.98


def test_bootstrap_interval_has_width_of_normal_theory() -> None:
    """Long documents differ more: R ± 1.96 √Σ(d - R t)² / Σt (delta method); how hard a document is cancels."""
    random, n = np.random.default_rng(1), 400
    tokens = random.integers(1, 100, n)
    base = random.normal(3.0, 5.0, n) * tokens
    deltas = (0.01 + 0.002 * tokens + random.normal(0, 0.1, n)) * tokens
    found = bootstrap_difference([losses_of(base + deltas, tokens)], [losses_of(base, tokens)], seed=3)
    assert found.low is not None
    assert found.high is not None
    ratio = deltas.sum() / tokens.sum()
    half = 1.96 * math.sqrt(((deltas - ratio * tokens) ** 2).sum()) / tokens.sum()
    assert found.mean == pytest.approx(ratio)
    assert (found.low, found.high) == (
        pytest.approx(ratio - half, abs=0.06 * half),
        pytest.approx(ratio + half, abs=0.06 * half),
    )


def test_bootstrap_weights_documents_by_tokens_and_averages_runs() -> None:
    tokens = np.array([1, 3])
    runs = [losses_of(np.array([1.0, 6.0]), tokens), losses_of(np.array([3.0, 6.0]), tokens)]
    base = losses_of(np.array([0.0, 3.0]), tokens)
    found = bootstrap_difference(runs, [base], seed=0)
    assert found.mean == pytest.approx((2.0 + 3.0) / 4)
    # Of two documents, a resample holds both, or one of them twice: 2 nats per token or 1.
    assert (found.low, found.high) == (pytest.approx(1.0), pytest.approx(2.0))
    assert bootstrap_difference(runs, [base], seed=0) == found
    only = bootstrap_difference(runs, [base], documents=np.array([1]))
    assert (only.mean, only.low, only.n_documents) == (pytest.approx(1.0), None, 1)


def test_bootstrap_refuses_other_documents() -> None:
    ours = losses_of(np.ones(2), np.array([1, 2]))
    with pytest.raises(ValueError, match="same documents"):
        bootstrap_difference([ours], [losses_of(np.ones(2), np.array([2, 1]))])

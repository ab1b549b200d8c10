"""Perplexity cost of quantized weights on text sampled from the model."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from psannlm.benchmarks.decoding.quantization_quality import (
    measure_packing_cost,
    packing_cost,
    sample_texts,
    token_losses,
)
from psannlm.benchmarks.harness.interleaved import RunProgress
from psannlm.generation.engine import Engine
from psannlm.models.transformer import Transformer


def ignore(done: int, total: int) -> None:
    pass


def test_packing_cost_ratio_is_ratio_of_perplexities() -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 2.0])
    cost = packing_cost(losses, losses + torch.tensor([0.1, 0.3, 0.1, 0.3]))
    assert cost.perplexity == pytest.approx(math.exp(2.0))
    assert cost.packed_perplexity == pytest.approx(math.exp(2.2))
    assert cost.ratio == pytest.approx(cost.packed_perplexity / cost.perplexity)
    assert cost.ratio_error == pytest.approx(math.exp(0.2) * 0.1 / 2)
    assert cost.n_tokens == 4


def test_token_losses_match_cross_entropy_of_next_token(build_tiny: Callable[..., Transformer]) -> None:
    model = build_tiny(seed=2)
    ids = torch.tensor([[1, 5, 2, 9], [3, 3, 3, 0]])
    with torch.no_grad():
        expected = model.logits(model.hidden_states(ids[:, :-1])).log_softmax(-1)
    expected = -expected.gather(2, ids[:, 1:, None]).flatten()
    torch.testing.assert_close(token_losses(model, ids, ignore), expected)


@pytest.mark.slow
def test_sample_texts_follow_the_model_distribution(build_tiny: Callable[..., Transformer]) -> None:
    """On its own samples a model's mean loss is its mean entropy; on anything else it would be larger."""
    model = build_tiny(seed=2)
    ids = sample_texts(Engine(model), 64, 24, 5, ignore)
    assert ids.shape == (64, 25)
    with torch.no_grad():
        log_p = model.logits(model.hidden_states(ids[:, :-1])).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    losses = token_losses(model, ids, ignore).view(64, 24)
    error = (losses - entropy).std() / math.sqrt(losses.numel())
    assert abs((losses - entropy).mean()) < 4 * error
    assert torch.equal(ids, sample_texts(Engine(model), 64, 24, 5, ignore))
    assert not torch.equal(ids, sample_texts(Engine(model), 64, 24, 6, ignore))
    assert len({tuple(row) for row in ids[:, 1:].tolist()}) == 64


def test_packing_cost_int8_exceeds_float32(build_tiny: Callable[..., Transformer]) -> None:
    model = build_tiny(seed=2, max_seq_len=64)
    events: list[RunProgress] = []
    same, int8 = (
        measure_packing_cost(model, Engine(model, dtype=dtype), seed=3, n_rows=4, on_progress=events.append)
        for dtype in ("float32", "int8")
    )
    assert same.ratio == pytest.approx(1.0, abs=1e-5)
    # The context holds 64 tokens: the first is given, 63 are drawn.
    assert same.n_tokens == int8.n_tokens == 4 * 63
    assert 1e-5 < abs(int8.ratio - 1.0) < 0.1
    assert same.perplexity == int8.perplexity
    assert events[-1].done == events[-1].total == 4 * 63

"""ALiBi in the forward pass against a reference with the paper's slopes, for any head size and length."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from psannlm.config.model import ModelConfig
from psannlm.errors import ConfigError
from psannlm.models.attention import Attention, attention_context, cached_attention_context
from psannlm.models.positions import alibi_bias, alibi_slopes
from psannlm.models.transformer import Transformer

Build = Callable[..., Transformer]
# Press, Smith and Lewis 2021 (arXiv 2108.12409), section 3: a geometric sequence from 2 ** (-8 / n) with that ratio for
# n = 2, 4, 8, ... heads; their code fills up other numbers with every other slope of the next power of two.
SLOPES = {
    1: [1 / 256],
    2: [1 / 16, 1 / 256],
    3: [1 / 16, 1 / 256, 1 / 4],
    4: [1 / 4, 1 / 16, 1 / 64, 1 / 256],
    8: [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256],
}


def tokens(n_rows: int, n_tokens: int) -> Tensor:
    return torch.randint(0, 17, (n_rows, n_tokens), generator=torch.Generator().manual_seed(0))


def by_hand(attention: Attention, x: Tensor, slopes: list[float]) -> Tensor:
    """Softmax of q·k / sqrt(K) - slope · (query position - key position), a query and a head at a time."""
    queries, keys, values = (part.double() for part in attention.project(x))
    size = attention.head_dim
    mixed = torch.zeros_like(queries)
    for row in range(x.shape[0]):
        for head, slope in enumerate(slopes):
            part = slice(head * size, (head + 1) * size)
            for query in range(x.shape[1]):
                scores = [
                    float(queries[row, query, part] @ keys[row, key, part]) / math.sqrt(size) - slope * (query - key)
                    for key in range(query + 1)
                ]
                weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
                mixed[row, query, part] = weights @ values[row, : query + 1, part]
    return attention.out_proj(mixed.float())


def seen_in_forward(model: Transformer, input_ids: Tensor) -> list[tuple[Attention, Tensor, Tensor]]:
    """Every attention of a forward pass with its input and its output."""
    seen: list[tuple[Attention, Tensor, Tensor]] = []
    hooks = [
        block.attention.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out)))
        for block in model.blocks
    ]
    model(input_ids)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("base", ["waveresnet", "respsann"])
@pytest.mark.parametrize(("n_heads", "d_model"), [(1, 12), (2, 10), (3, 15), (4, 12), (8, 24)])
@torch.no_grad()
def test_alibi_forward_equals_attention_by_hand(base: str, n_heads: int, d_model: int, build_tiny: Build) -> None:
    model = build_tiny(base=base, positional_encoding="alibi", n_heads=n_heads, d_model=d_model)
    seen = seen_in_forward(model, tokens(2, 7))
    assert len(seen) == 2
    for attention, x, out in seen:
        torch.testing.assert_close(out, by_hand(attention, x, SLOPES[n_heads]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", ["doubled", "reversed", "one for all", "rising with distance"])
@torch.no_grad()
def test_alibi_reference_detects_wrong_slopes(wrong: str, build_tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.tensor(SLOPES[4])
    slopes = {
        "doubled": 2 * right,
        "reversed": right.flip(0),
        "one for all": right[:1].expand(4),
        "rising with distance": -right,
    }[wrong]
    monkeypatch.setattr("psannlm.models.attention.alibi_slopes", lambda n_heads, device=None: slopes)
    model = build_tiny(positional_encoding="alibi", n_heads=4)
    attention, x, out = seen_in_forward(model, tokens(2, 7))[0]
    assert (out - by_hand(attention, x, SLOPES[4])).abs().max() > 1e-3


@pytest.mark.parametrize("shift", [1, 5, 1000])
def test_alibi_bias_depends_on_distance_alone(shift: int) -> None:
    slopes, positions = alibi_slopes(3), torch.arange(9)
    bias = alibi_bias(slopes, positions, positions)
    assert torch.equal(alibi_bias(slopes, positions + shift, positions + shift), bias)
    wanted = -torch.tensor(SLOPES[3])[:, None] * torch.arange(9)
    assert torch.equal(bias[:, 8].flip(-1), wanted)
    assert bias[:, 0, 1:].eq(-math.inf).all()


def test_alibi_context_of_shifted_rows_is_equal(build_tiny: Build) -> None:
    config = build_tiny(positional_encoding="alibi").config
    started = attention_context(config, 4, torch.device("cpu"))
    assert started.rope is None
    assert started.mask is not None
    moved = cached_attention_context(config, torch.tensor([0, 10]), torch.arange(14), 4, torch.float32)
    assert moved.rope is None
    assert moved.mask is not None
    # Row 0 starts at position 0, row 1 at 10: the biases between the tokens of a row are the same.
    assert torch.equal(moved.mask[0, :, :, :4], started.mask[0])
    assert torch.equal(moved.mask[1, :, :, 10:], started.mask[0])


@torch.no_grad()
def test_alibi_equal_tokens_have_equal_logits(build_tiny: Build) -> None:
    input_ids = torch.full((1, 40), 5)
    for position, is_absolute in (("alibi", False), ("sinusoidal", True)):
        # Longer than max_seq_len 32, and without short convolutions, which see the beginning.
        logits = build_tiny(positional_encoding=position, short_conv={"enabled": False})(input_ids)[0]
        spread = (logits - logits[:1]).abs().max()
        assert (spread > 1e-3) == is_absolute


def test_rope_requires_even_head_dim(build_tiny: Build) -> None:
    with pytest.raises(ConfigError, match="odd head size 5"):
        ModelConfig(d_model=15, n_heads=3, positional_encoding="rope")
    assert build_tiny(positional_encoding="alibi", d_model=15, n_heads=3)(tokens(1, 4)).shape == (1, 4, 17)

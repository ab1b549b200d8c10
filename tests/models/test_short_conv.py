"""Short convolution against its sum: whole sequences, chunks with a state, and ragged rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psannlm.config.model import ModelConfig
from psannlm.models.short_conv import ShortConv

D = 3


def build_conv(kernel_size: int, dilation: int, activation: str = "none") -> ShortConv:
    config = ModelConfig(d_model=D, n_heads=1, positional_encoding="alibi").model_copy(
        update={
            "short_conv": ModelConfig().short_conv.model_copy(
                update={"kernel_size": kernel_size, "activation": activation}
            )
        }
    )
    conv = ShortConv(config, dilation)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(conv.weight.shape, generator=torch.Generator().manual_seed(kernel_size)))
    return conv


def reference(conv: ShortConv, x: torch.Tensor) -> torch.Tensor:
    """x[t] + act(sum over taps of weight[tap] x[t - (kernel - 1 - tap) dilation]), nothing before the start."""
    mixed = torch.zeros_like(x)
    kernel_size = conv.weight.shape[1]
    for t in range(x.shape[1]):
        for tap in range(kernel_size):
            source = t - (kernel_size - 1 - tap) * conv.dilation
            if source >= 0:
                mixed[:, t] += conv.weight[:, tap] * x[:, source]
    return x + conv.activation(mixed)


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dilation", [1, 2, 5])
@pytest.mark.parametrize("activation", ["none", "sine"])
@pytest.mark.parametrize("is_packed", [False, True])
@torch.no_grad()
def test_short_conv_matches_causal_sum(kernel_size: int, dilation: int, activation: str, is_packed: bool) -> None:
    conv = build_conv(kernel_size, dilation, activation)
    if is_packed:
        conv.taps = conv.weight.t().contiguous()
    # Few tokens are summed tap by tap, and many by a convolution.
    for n_tokens in (1, 2, 9, 16, 17, 30):
        x = torch.randn(2, n_tokens, D)
        found, inputs = conv(x)
        torch.testing.assert_close(found, reference(conv, x), rtol=1e-5, atol=1e-5)
        assert torch.equal(inputs[:, conv.state_length :], x)
        assert torch.equal(inputs[:, : conv.state_length], torch.zeros(2, conv.state_length, D))


@pytest.mark.slow
@pytest.mark.parametrize("n_tokens", [17, 30])
@torch.no_grad()
def test_short_conv_compiled_matches_causal_sum(n_tokens: int) -> None:
    """Many tokens are summed tap by tap then. Only tracing is tried here, which is what decides the way."""
    conv = build_conv(4, 2)
    x = torch.randn(2, n_tokens, D)
    found, inputs = torch.compile(conv, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(found, reference(conv, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(inputs[:, conv.state_length :], x)


@given(
    kernel_size=st.integers(1, 5),
    dilation=st.integers(1, 3),
    chunks=st.lists(st.integers(1, 20), min_size=1, max_size=6),
)
@settings(deadline=None, max_examples=60)
@torch.no_grad()
def test_short_conv_chunks_with_state_match_whole(kernel_size: int, dilation: int, chunks: list[int]) -> None:
    conv = build_conv(kernel_size, dilation)
    x = torch.randn(2, sum(chunks), D, generator=torch.Generator().manual_seed(0))
    conv_state = torch.zeros(2, conv.state_length, D)
    parts = []
    for chunk in x.split(chunks, dim=1):
        part, inputs = conv(chunk, conv_state)
        assert torch.equal(inputs, torch.cat((conv_state, chunk), dim=1))
        conv_state = inputs[:, inputs.shape[1] - conv.state_length :]
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), reference(conv, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["none", "sine"])
def test_short_conv_starts_as_trainable_identity(activation: str) -> None:
    conv = build_conv(4, 1, activation)
    with torch.no_grad():
        conv.weight.zero_()
    x = torch.randn(2, 5, D)
    out, _ = conv(x)
    assert torch.equal(out, x)
    out.pow(2).sum().backward()
    assert conv.weight.grad is not None
    assert conv.weight.grad.abs().min() > 0

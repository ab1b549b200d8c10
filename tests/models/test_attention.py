"""Attention against its formula in float64, and the mask that each kind of pass uses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from psannlm.config.model import ModelConfig, PositionKind
from psannlm.errors import GenerationError
from psannlm.models.attention import Attention, attention_context, cached_attention_context
from psannlm.models.kv_cache import KVCache
from psannlm.models.positions import alibi_slopes, apply_rotary_emb, rope_tables
from psannlm.models.transformer import Transformer

CPU = torch.device("cpu")


def reference(attention: Attention, x: Tensor, position: str) -> Tensor:
    """softmax(q k / sqrt(K) + bias) v, head by head and query by query."""
    n_rows, n_tokens, _ = x.shape
    out = torch.zeros(n_rows, n_tokens, attention.n_heads, attention.head_dim, dtype=torch.float64)
    per_group = attention.n_heads // attention.n_kv_heads
    for head in range(attention.n_heads):
        of_head = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        group = head // per_group
        of_group = slice(group * attention.head_dim, (group + 1) * attention.head_dim)
        q, k = x @ attention.q_proj.weight[of_head].t(), x @ attention.k_proj.weight[of_group].t()
        v = x @ attention.v_proj.weight[of_group].t()
        if attention.q_norm is not None and attention.k_norm is not None:
            q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.q_norm.weight
            k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.k_norm.weight
        if position == "rope":
            tables = rope_tables(torch.arange(n_tokens), attention.head_dim)
            q, k = apply_rotary_emb(q, tables), apply_rotary_emb(k, tables)
        for t in range(n_tokens):
            scores = (k[:, : t + 1] * q[:, t : t + 1]).sum(-1).double() / math.sqrt(attention.head_dim)
            if position == "alibi":
                scores += float(alibi_slopes(attention.n_heads)[head]) * (torch.arange(t + 1) - t)
            out[:, t, head] = (scores.softmax(-1).unsqueeze(-1) * v[:, : t + 1].double()).sum(1)
    return out.flatten(2) @ attention.out_proj.weight.t().double()


@pytest.mark.parametrize("position", ["rope", "alibi", "sinusoidal"])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_attention_matches_grouped_query_softmax(position: str, n_kv_heads: int, qk_norm: bool) -> None:
    torch.manual_seed(0)
    config = ModelConfig(d_model=16, n_heads=4, n_kv_heads=n_kv_heads, positional_encoding=position, qk_norm=qk_norm)
    attention = Attention(config)
    for norm in (attention.q_norm, attention.k_norm):
        if norm is not None:
            norm.weight.copy_(torch.randn(4))
    x = torch.randn(2, 7, 16)
    found = attention(x, attention_context(config, 7, CPU))
    torch.testing.assert_close(found.double(), reference(attention, x, position), rtol=1e-4, atol=1e-5)
    assert attention.k_proj.weight.shape[0] == n_kv_heads * 4
    assert not any("bias" in name for name, _ in attention.named_parameters())


@pytest.mark.parametrize("position", ["rope", "sinusoidal"])
def test_attention_full_sequences_use_kernel_mask(position: str) -> None:
    config = ModelConfig(d_model=8, n_heads=2, n_layers=1, positional_encoding=position)
    for state in (None, KVCache.allocate(config, 3, 100, CPU, torch.float32)):
        context = attention_context(config, 100, CPU, state)
        assert context.mask is None
        assert context.kv_len == 0
        assert context.positions.tolist() == list(range(100))


@pytest.mark.parametrize("head_dim", [64, 24])
def test_decoded_row_sums_do_not_depend_on_slots_read(head_dim: int) -> None:
    config = ModelConfig(d_model=2 * head_dim, n_heads=2, n_layers=1)
    torch.manual_seed(0)
    attention = Attention(config).eval()
    cache = KVCache.allocate(config, 2, 320, CPU, torch.float32)
    cache.layers[0].keys.normal_()
    cache.layers[0].values.normal_()
    x = torch.randn(2, 1, config.d_model)

    def first_row(length: int, other: int) -> torch.Tensor:
        cache.lengths, cache.offsets = [length, other], torch.tensor([length, other])
        return attention(x, attention_context(config, 1, CPU, cache), cache.layers[0])[0]

    with torch.inference_mode():
        for length in [*range(1, 40), 63, 64, 65, 111, 112, 200, 278]:
            assert torch.equal(first_row(length, 1), first_row(length, 279)), length


@pytest.mark.parametrize("position", get_args(PositionKind))
def test_attention_cached_rows_see_only_their_past(position: str) -> None:
    config = ModelConfig(d_model=8, n_heads=2, n_layers=1, positional_encoding=position)
    state = KVCache.allocate(config, 2, 200, CPU, torch.float32)
    state.lengths, state.offsets = [1, 70], torch.tensor([1, 70])
    context = attention_context(config, 2, CPU, state)
    assert context.positions.tolist() == [[1, 2], [70, 71]]
    assert context.kv_len == 80  # whole blocks of READ_BLOCK_TOKENS
    assert context.mask is not None
    slots = torch.arange(80)
    for row, first in enumerate([1, 70]):
        for place in range(2):
            for head in range(context.mask.shape[1]):
                scores = context.mask[row, head, place]
                assert torch.equal(scores.isneginf(), slots > first + place)
                slope = float(alibi_slopes(2)[head]) if position == "alibi" else 0.0
                seen = slots[: first + place + 1]
                torch.testing.assert_close(scores[: first + place + 1], slope * (seen - first - place).float())


def test_attention_reads_no_slots_beyond_capacity() -> None:
    config = ModelConfig(d_model=8, n_heads=2, n_layers=1)
    state = KVCache.allocate(config, 1, 20, CPU, torch.float32)
    state.lengths, state.offsets = [10], torch.tensor([10])
    assert attention_context(config, 10, CPU, state).kv_len == 20
    with pytest.raises(GenerationError, match=r"row 0: 10 \+ 11 tokens exceed the cache of 20"):
        attention_context(config, 11, CPU, state)


@pytest.mark.parametrize("position", get_args(PositionKind))
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_attention_reduction_matches_kernel(position: str, n_kv_heads: int, dtype: torch.dtype) -> None:
    config = ModelConfig(d_model=24, n_heads=4, n_kv_heads=n_kv_heads, positional_encoding=position)
    attention = Attention(config)
    generator = torch.Generator().manual_seed(0)
    context = cached_attention_context(config, torch.tensor([0, 5, 61]), torch.arange(64), 3, torch.float32)
    q = torch.randn(3, 4, 3, 6, generator=generator).to(dtype)
    k, v = (torch.randn(3, n_kv_heads, 64, 6, generator=generator).to(dtype) for _ in range(2))
    by_kernel, by_sums = attention._attend(q, k, v, context), attention._attend_reduction(q, k, v, context)
    assert by_sums.dtype == by_kernel.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(by_sums.float(), by_kernel.float(), rtol=0, atol=tolerance)


class LargestTensor(TorchDispatchMode):
    """Remembers the elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.n_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.n_elements = max(self.n_elements, tensor.numel())
        return out


@pytest.mark.parametrize("position", ["rope", "sinusoidal"])
def test_attention_training_allocates_no_quadratic_tensor(
    position: str, build_tiny: Callable[..., Transformer]
) -> None:
    model = build_tiny(positional_encoding=position)
    n_tokens = 1024
    input_ids = torch.zeros(1, n_tokens, dtype=torch.long)
    with LargestTensor() as largest:
        model.hidden_states(input_ids).sum().backward()
    assert largest.n_elements < n_tokens * n_tokens // 8

"""Attention against its formula in float64; the layout tells each pass the cheapest mask that is right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from psannlm.config.model import ModelConfig
from psannlm.models.attention import Attention, plan_layout
from psannlm.models.cache import DecodeState
from psannlm.models.positions import alibi_slopes, rope_tables, rotate
from psannlm.models.transformer import Transformer

CPU = torch.device("cpu")


def reference(attention: Attention, x: Tensor, position: str) -> Tensor:
    """softmax(q k / sqrt(K) + bias) v, head by head and query by query."""
    n_rows, n_tokens, _ = x.shape
    out = torch.zeros(n_rows, n_tokens, attention.n_heads, attention.head_dim, dtype=torch.float64)
    per_group = attention.n_heads // attention.n_groups
    for head in range(attention.n_heads):
        of_head = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        group = head // per_group
        of_group = slice(group * attention.head_dim, (group + 1) * attention.head_dim)
        q, k = x @ attention.q_proj.weight[of_head].t(), x @ attention.k_proj.weight[of_group].t()
        v = x @ attention.v_proj.weight[of_group].t()
        if position == "rope":
            tables = rope_tables(torch.arange(n_tokens), attention.head_dim)
            q, k = rotate(q, tables), rotate(k, tables)
        for t in range(n_tokens):
            scores = (k[:, : t + 1] * q[:, t : t + 1]).sum(-1).double() / math.sqrt(attention.head_dim)
            if position == "alibi":
                scores += float(alibi_slopes(attention.n_heads)[head]) * (torch.arange(t + 1) - t)
            out[:, t, head] = (scores.softmax(-1).unsqueeze(-1) * v[:, : t + 1].double()).sum(1)
    return out.flatten(2) @ attention.out_proj.weight.t().double()


@pytest.mark.parametrize("position", ["rope", "alibi", "sinusoidal"])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@torch.no_grad()
def test_is_softmax_attention_with_grouped_queries(position: str, n_kv_heads: int) -> None:
    torch.manual_seed(0)
    config = ModelConfig(d_model=16, n_heads=4, n_kv_heads=n_kv_heads, positional_encoding=position)
    attention = Attention(config)
    x = torch.randn(2, 7, 16)
    found = attention(x, plan_layout(config, torch.zeros(2, 7, dtype=torch.long)))
    torch.testing.assert_close(found.double(), reference(attention, x, position), rtol=1e-4, atol=1e-5)
    assert attention.k_proj.weight.shape[0] == n_kv_heads * 4
    assert not any("bias" in name for name, _ in attention.named_parameters())


@pytest.mark.parametrize("position", ["rope", "sinusoidal"])
def test_without_a_cache_the_kernel_masks(position: str) -> None:
    config = ModelConfig(d_model=8, n_heads=2, positional_encoding=position)
    layout = plan_layout(config, torch.zeros(3, 100, dtype=torch.long))
    assert layout.mask is None
    assert layout.is_causal
    assert (layout.start, layout.span, layout.n_new) == (0, 0, None)


def test_prefill_and_single_steps_need_no_mask_either() -> None:
    config = ModelConfig(d_model=8, n_heads=2, n_layers=1)
    state = DecodeState.allocate(config, 2, 20, CPU, torch.float32)
    prefill = plan_layout(config, torch.zeros(2, 10, dtype=torch.long), state, [10, 10])
    assert prefill.mask is None
    assert prefill.is_causal
    state.lengths = [10, 10]
    step = plan_layout(config, torch.zeros(2, 1, dtype=torch.long), state)
    assert step.mask is None
    assert not step.is_causal  # the kernel's causal mask starts at the top left, and would show the first slot alone
    assert step.span == 11


def test_ragged_steps_mask_what_a_row_has_not_seen() -> None:
    config = ModelConfig(d_model=8, n_heads=2, n_layers=1)
    state = DecodeState.allocate(config, 2, 20, CPU, torch.float32)
    state.lengths = [1, 3]
    layout = plan_layout(config, torch.zeros(2, 2, dtype=torch.long), state, [2, 1])
    assert layout.span == 4
    assert layout.mask is not None
    assert layout.mask[0, 0].tolist() == [[True, True, False, False], [True, True, True, False]]
    assert layout.mask[1, 0, 0].tolist() == [True, True, True, True]
    assert layout.positions.tolist() == [[1, 2], [3, 4]]
    assert layout.rows is not None
    assert layout.slots is not None
    assert list(zip(layout.rows.tolist(), layout.slots.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 3)]


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
def test_training_makes_no_tensor_of_time_by_time(position: str, build_tiny: Callable[..., Transformer]) -> None:
    model = build_tiny(positional_encoding=position)
    n_tokens = 1024
    input_ids = torch.zeros(1, n_tokens, dtype=torch.long)
    with LargestTensor() as largest:
        model.hidden_states(input_ids).sum().backward()
    assert largest.n_elements < n_tokens * n_tokens // 8

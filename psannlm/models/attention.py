"""Causal self-attention on scaled_dot_product_attention, with or without a cache, rows of one length or many.

Letters: B rows, T new tokens, S cached and new tokens, H query heads, G key/value heads, K head size, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psannlm.config.model import ModelConfig
from psannlm.models.cache import DecodeState, LayerState
from psannlm.models.positions import alibi_bias, alibi_slopes, rope_tables, rotate


@dataclass(frozen=True)
class Layout:
    """What all blocks share in one forward pass: where the new tokens stand, and what each may look at.

    Attributes:
        positions: (T,) when every row stands at the same place, else (B, T); integers.
        n_new: new tokens per row, or None when every row has all T; the rest of a row is padding.
        span: S, the cache slots that attention reads; 0 without a cache.
        start: the common position of the first new token, or None when rows differ.
        rope: cosines and sines, or None.
        mask: boolean or float (B or 1, H or 1, T, S), or None where is_causal or nothing is needed.
        is_causal: whether the plain causal mask of the kernel is the right one.
        rows, slots, steps: indices (N,) of the valid new tokens when rows differ: row, cache slot, place in the chunk.
    """

    positions: Tensor
    n_new: list[int] | None
    span: int
    start: int | None
    rope: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    is_causal: bool
    rows: Tensor | None = None
    slots: Tensor | None = None
    steps: Tensor | None = None


def plan_layout(
    config: ModelConfig, input_ids: Tensor, state: DecodeState | None = None, n_new: Sequence[int] | None = None
) -> Layout:
    """Work out the :class:`Layout` of a forward pass over ``input_ids`` (B, T), of which row b has ``n_new[b]`` tokens.

    Raises:
        GenerationError: the cache has no room for the new tokens.
    """
    batch_size, n_tokens = input_ids.shape
    device = input_ids.device
    ragged_new = None if n_new is None or all(n == n_tokens for n in n_new) else list(n_new)
    lengths = [0] * batch_size if state is None else state.lengths
    if state is not None:
        state.require_room(ragged_new or [n_tokens] * batch_size)
    steps = torch.arange(n_tokens, device=device)
    is_uniform = ragged_new is None and len(set(lengths)) == 1
    start = lengths[0] if is_uniform else None
    positions = steps + start if start is not None else torch.tensor(lengths, device=device)[:, None] + steps
    if state is None:
        span = 0
    else:
        span = max(length + new for length, new in zip(lengths, ragged_new or [n_tokens] * batch_size, strict=True))

    rope = None
    if config.positional_encoding == "rope":
        cos, sin = rope_tables(positions, config.d_model // config.n_heads)
        rope = (cos, sin) if start is not None else (cos.unsqueeze(1), sin.unsqueeze(1))

    key_positions = torch.arange(span or n_tokens, device=device)
    mask: Tensor | None = None
    is_causal = False
    if config.positional_encoding == "alibi":
        bias = alibi_bias(alibi_slopes(config.n_heads, device), positions, key_positions)
        mask = bias if bias.ndim == 4 else bias.unsqueeze(0)
    elif start == 0 and n_tokens > 1:
        is_causal = True
    elif start is None or n_tokens > 1:
        mask = key_positions <= positions.unsqueeze(-1)
        mask = mask[:, None] if mask.ndim == 3 else mask[None, None]
    if start is not None or state is None:
        return Layout(positions, ragged_new, span, start, rope, mask, is_causal)

    counts = ragged_new or [n_tokens] * batch_size
    valid = [(row, lengths[row] + step, step) for row, n in enumerate(counts) for step in range(n)]
    rows, slots, places = torch.tensor(valid, device=device).reshape(-1, 3).unbind(1)
    return Layout(positions, ragged_new, span, None, rope, mask, is_causal, rows, slots, places)


class Attention(nn.Module):
    """Multi-head causal attention without biases, with grouped queries (arXiv 2305.13245) when G < H."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.n_groups = config.n_kv_heads or config.n_heads
        self.head_dim = config.d_model // config.n_heads
        self.q_proj = nn.Linear(config.d_model, self.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.d_model, self.n_groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.d_model, self.n_groups * self.head_dim, bias=False)
        self.out_proj = nn.Linear(self.n_heads * self.head_dim, config.d_model, bias=False)

    def forward(self, x: Tensor, layout: Layout, state: LayerState | None = None) -> Tensor:
        """Map (B, T, D) to (B, T, D); with a ``state``, append the new keys and values to it first."""
        q = self.q_proj(x).unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (self.n_groups, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.n_groups, self.head_dim)).transpose(1, 2)
        if layout.rope is not None:
            q, k = rotate(q, layout.rope), rotate(k, layout.rope)
        if state is not None:
            k, v = _append(state, k, v, layout)
        mask = layout.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        mixed = F.scaled_dot_product_attention(
            q, k.to(q.dtype), v.to(q.dtype), mask, is_causal=layout.is_causal, enable_gqa=self.n_groups != self.n_heads
        )
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(-2))
        return out


def _append(state: LayerState, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Write new keys and values (B, G, T, K) into the cache and return its first ``span`` slots."""
    if layout.start is not None:
        stop = layout.start + k.shape[2]
        state.keys[:, :, layout.start : stop] = k
        state.values[:, :, layout.start : stop] = v
    else:
        at = (layout.rows, slice(None), layout.slots)
        state.keys[at] = k[layout.rows, :, layout.steps].to(state.keys.dtype)
        state.values[at] = v[layout.rows, :, layout.steps].to(state.values.dtype)
    return state.keys[:, :, : layout.span], state.values[:, :, : layout.span]

"""Causal self-attention on scaled_dot_product_attention, with or without a cache, rows of one length or many.

Letters: B rows, T new tokens, S cached and new tokens, H query heads, G key/value heads, K head size, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psannlm.config.model import ModelConfig
from psannlm.kernels.compile import stored
from psannlm.kernels.cpu_attention import blocked_attention, is_blocked
from psannlm.kernels.onednn import Linear
from psannlm.models.kv_cache import MAX_DECODE_TOKENS, KVCache, LayerCache, whole_blocks
from psannlm.models.positions import alibi_bias, alibi_slopes, rope_tables, rotate

# Queries that a prefill on a CPU hands to the kernel at a time. It sums by blocks whose size depends on how many
# queries and keys there are, and a row must meet the same sums whatever the length of its company.
PREFILL_QUERIES = 32


@dataclass(frozen=True)
class Layout:
    """What all blocks share in one forward pass: where the new tokens stand, and what each may look at.

    Attributes:
        positions: (T,) when every row starts at its beginning, else (B, T); integers.
        span: S, the cache slots that attention reads; 0 where the new tokens are all there is to see.
        rope: cosines and sines, or None.
        mask: float (B or 1, H or 1, T, S), added to the scores, or None where the kernel's own causal mask is right.
        is_prefill: whether T new tokens, a multiple of ``PREFILL_QUERIES``, start a state.
    """

    positions: Tensor
    span: int
    rope: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    is_prefill: bool = False


def plan_layout(config: ModelConfig, n_tokens: int, device: torch.device, state: KVCache | None = None) -> Layout:
    """Work out the :class:`Layout` of a forward pass over ``n_tokens`` per row, after those that ``state`` has seen.

    Raises:
        GenerationError: the cache has no room for the new tokens.
    """
    if state is not None:
        state.check_capacity(n_tokens)
        if any(state.lengths):
            span = min(whole_blocks(max(state.lengths) + n_tokens), state.capacity)
            slots = torch.arange(span, device=device)
            return continue_layout(config, state.offsets, slots, n_tokens, state.layers[0].keys.dtype)
    positions = torch.arange(n_tokens, device=device)
    mask = None
    if config.positional_encoding == "alibi":
        mask = alibi_bias(alibi_slopes(config.n_heads, device), positions, positions).unsqueeze(0)
    is_prefill = state is not None and n_tokens % PREFILL_QUERIES == 0
    return Layout(positions, 0, _rope(config, positions), mask, is_prefill)


def continue_layout(config: ModelConfig, offsets: Tensor, slots: Tensor, n_tokens: int, dtype: torch.dtype) -> Layout:
    """Return the layout of rows that go on from ``offsets`` (B,), each from its own; worked out on the device.

    Args:
        slots: (S,) the numbers 0 .. S-1 of the cache slots to read: at least the longest row with its new tokens.
        dtype: of the mask.
    """
    positions = offsets[:, None] + torch.arange(n_tokens, device=offsets.device)
    if config.positional_encoding == "alibi":
        mask = alibi_bias(alibi_slopes(config.n_heads, offsets.device), positions, slots)
    else:
        hidden = slots > positions[:, None, :, None]
        mask = torch.zeros(hidden.shape, device=offsets.device).masked_fill(hidden, float("-inf"))
    return Layout(positions, slots.shape[0], _rope(config, positions.unsqueeze(1)), mask.to(dtype))


def _rope(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor] | None:
    if config.positional_encoding != "rope":
        return None
    return rope_tables(positions, config.d_model // config.n_heads)


class Attention(nn.Module):
    """Multi-head causal attention without biases, with grouped queries (arXiv 2305.13245) when G < H."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.n_groups = config.n_kv_heads or config.n_heads
        self.head_dim = config.d_model // config.n_heads
        self.q_proj = Linear(config.d_model, self.n_heads * self.head_dim, bias=False)
        self.k_proj = Linear(config.d_model, self.n_groups * self.head_dim, bias=False)
        self.v_proj = Linear(config.d_model, self.n_groups * self.head_dim, bias=False)
        self.out_proj: nn.Module = Linear(self.n_heads * self.head_dim, config.d_model, bias=False)
        # Henry et al. 2020, arXiv 2010.04245, with RMSNorm and one scale per feature of a head.
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if config.qk_norm else None
        # All three projections as one, in a model packed for inference.
        self.qkv_proj: nn.Module | None = None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, T, H K or G K) of (B, T, D)."""
        if self.qkv_proj is None:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        sizes = [self.n_heads * self.head_dim, self.n_groups * self.head_dim, self.n_groups * self.head_dim]
        q, k, v = self.qkv_proj(x).split(sizes, dim=-1)
        return q, k, v

    def forward(self, x: Tensor, layout: Layout, state: LayerCache | None = None) -> Tensor:
        """Map (B, T, D) to (B, T, D); with a ``state``, write the new keys and values into it first."""
        queries, keys, values = self.project(x)
        q = queries.view(*x.shape[:2], self.n_heads, self.head_dim).transpose(1, 2)
        k = keys.view(*x.shape[:2], self.n_groups, self.head_dim).transpose(1, 2)
        v = values.view(*x.shape[:2], self.n_groups, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            # Means of squares in float32, as in every other norm, where the projections are narrower.
            q, k = self.q_norm(q.float()).to(q.dtype), self.k_norm(k.float()).to(k.dtype)
        if layout.rope is not None:
            q, k = rotate(q, layout.rope), rotate(k, layout.rope)
        if state is not None:
            k, v = _remember(state, k, v, layout)
        mixed = self._mix(q, k, v, layout)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(-2))
        return out

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """Softmax attention of q (B, H, T, K) over k and v (B, G, S, K), which may be narrower than q."""
        if layout.span and q.shape[2] <= MAX_DECODE_TOKENS and torch.compiler.is_compiling():
            return self._mix_in_sums(q, k, v, layout)
        if layout.is_prefill and not q.is_cuda:
            return self._mix_in_blocks(q, k, v, layout.mask)
        if not layout.span and is_blocked(q):
            return blocked_attention(q, k, v, layout.mask)
        dtype = q.dtype
        if layout.span and q.shape[2] <= MAX_DECODE_TOKENS and not q.is_cuda:
            # On a CPU the bfloat16 kernel is several times slower for few queries than widening what it would read.
            q, k, v = q.float(), k.float(), v.float()
        elif layout.span:
            q = q.to(k.dtype)
        mask = None if layout.mask is None else layout.mask.to(q.dtype)
        if mask is not None and layout.span and 1 < q.shape[2] <= MAX_DECODE_TOKENS and not q.is_cuda:
            # Each query as a head of its own: with several the kernel sums in another order than with one, and a token
            # must find the same whether it is offered alone or among guesses.
            mask = mask.expand(-1, self.n_heads, -1, -1).flatten(1, 2).unsqueeze(2)
            by_query = F.scaled_dot_product_attention(q.flatten(1, 2).unsqueeze(2), k, v, mask, enable_gqa=True)
            return by_query.view(q.shape).to(dtype)
        mixed = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None and q.shape[2] > 1, enable_gqa=self.n_groups != self.n_heads
        )
        return mixed.to(dtype)

    def _mix_in_blocks(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """The same for queries that start a sequence, a block at a time, each with the keys up to its own end."""
        wide_q, k, v = q.float(), k.float(), v.float()
        n = PREFILL_QUERIES
        ahead = torch.full((n, n), float("-inf")).triu(1)
        mixed = torch.empty_like(wide_q)
        for start in range(0, q.shape[2], n):
            end = start + n
            if bias is None:
                mask = F.pad(ahead, (start, 0))
            else:
                mask = bias[:, :, start:end, :end].float()
            mixed[:, :, start:end] = F.scaled_dot_product_attention(
                wide_q[:, :, start:end], k[:, :, :end], v[:, :, :end], mask, enable_gqa=self.n_groups != self.n_heads
            )
        return mixed.to(q.dtype)

    def _mix_in_sums(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """The same as sums in float32, which a compiler turns into one pass over keys and one over values."""
        assert layout.mask is not None
        shape = (q.shape[0], self.n_groups, self.n_heads // self.n_groups, q.shape[2])
        # Stored, or the compiler would rotate a query anew for every key, and take an exponential anew for every value.
        grouped = stored(q.float()).view(*shape, 1, self.head_dim)
        scores = (grouped * k.float()[:, :, None, None]).sum(-1).flatten(1, 2) * self.head_dim**-0.5
        scores = scores + layout.mask.float()
        weights = stored((scores - scores.amax(-1, keepdim=True)).exp())
        mixed = (weights.view(*shape, -1, 1) * v.float()[:, :, None, None]).sum(-2).flatten(1, 2)
        normed: Tensor = (mixed / weights.sum(-1, keepdim=True)).to(q.dtype)
        return normed


def _remember(state: LayerCache, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Write new keys and values (B, G, T, K) into the cache; return what attention reads, of all tokens so far."""
    if not layout.span:
        state.keys[:, :, : k.shape[2]] = k
        state.values[:, :, : v.shape[2]] = v
        return k, v
    rows = torch.arange(k.shape[0], device=k.device)[:, None]
    state.keys[rows, :, layout.positions] = k.transpose(1, 2).to(state.keys.dtype)
    state.values[rows, :, layout.positions] = v.transpose(1, 2).to(state.values.dtype)
    return state.keys[:, :, : layout.span], state.values[:, :, : layout.span]

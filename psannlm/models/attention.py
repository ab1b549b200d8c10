"""Causal self-attention on ``scaled_dot_product_attention``, with or without a KV cache, for ragged batches.

Letters as in ``psannlm.models``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psannlm.config.model import ModelConfig
from psannlm.kernels.compile import realize
from psannlm.kernels.cpu_attention import blocked_attention, use_blocked_attention
from psannlm.kernels.cpu_decoding import calls_cpp, few_query_attention
from psannlm.kernels.onednn import Linear
from psannlm.models.kv_cache import MAX_DECODE_TOKENS, KVCache, LayerCache, whole_read_blocks
from psannlm.models.positions import alibi_bias, alibi_slopes, apply_rotary_emb, rope_tables
from psannlm.models.qkv_features import QkvFeatures

# Queries per kernel call of a prefill on a CPU. The kernel sums by blocks whose size depends on the numbers of queries
# and keys; with a fixed number of queries a row gets the same sums whatever the length of the other rows of its batch.
PREFILL_QUERIES = 32


@dataclass(frozen=True)
class AttentionContext:
    """Positions, RoPE tables and mask of one forward pass, shared by all blocks.

    Attributes:
        positions: of the new tokens: (T,) when all rows have equally many before them, else (B, T); integers.
        kv_len: S, the cache slots that attention reads; 0 where ``positions`` end with the last of them.
        rope: cosines and sines, or None.
        mask: float (B or 1, H or 1, T, S), added to the scores, or None where the kernel's own causal mask is right.
        is_prefill: whether T new tokens, a multiple of ``PREFILL_QUERIES``, start or continue a prompt in a cache.
        n_before: tokens before the new ones in every row of a prefill.
        block_masks: of a prefill on a CPU, the mask of each ``PREFILL_QUERIES`` queries over the keys up to them.
        document_positions: (B, T) of each token in its document, or None where each row is one document.
        slopes: of a decoding pass, float32 (H,): those of ALiBi, or zeros.
    """

    positions: Tensor
    kv_len: int
    rope: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    is_prefill: bool = False
    n_before: int = 0
    block_masks: tuple[Tensor, ...] = ()
    document_positions: Tensor | None = None
    slopes: Tensor | None = None


def attention_context(
    config: ModelConfig, n_tokens: int, device: torch.device, cache: KVCache | None = None
) -> AttentionContext:
    """Return the context of a forward pass over ``n_tokens`` per row that follow the committed tokens of ``cache``.

    Raises:
        GenerationError: the new tokens exceed the capacity of the cache.
    """
    n_before = 0
    is_prefill = cache is not None and n_tokens % PREFILL_QUERIES == 0
    if cache is not None:
        cache.check_capacity(n_tokens)
        n_before = cache.lengths[0]
        # A part of a prompt has the same products and sums as the whole, if it starts with a block of queries.
        is_prefill = is_prefill and n_before % PREFILL_QUERIES == 0 and len(set(cache.lengths)) == 1
        if any(cache.lengths) and not is_prefill:
            kv_len = min(whole_read_blocks(max(cache.lengths) + n_tokens), cache.capacity)
            slots = torch.arange(kv_len, device=device)
            return cached_attention_context(config, cache.offsets, slots, n_tokens, cache.layers[0].keys.dtype)
    positions = torch.arange(n_before, n_before + n_tokens, device=device)
    mask = None
    if config.positional_encoding == "alibi":
        keys = torch.arange(n_before + n_tokens, device=device)
        mask = alibi_bias(alibi_slopes(config.n_heads, device), positions, keys).unsqueeze(0)
    elif n_before and device.type != "cpu":
        # The kernel's own causal mask is that of a square.
        hidden = torch.ones(n_tokens, n_before + n_tokens, dtype=torch.bool, device=device).triu(n_before + 1)
        mask = torch.zeros(hidden.shape, device=device).masked_fill(hidden, float("-inf"))[None, None]
    block_masks = _block_masks(mask, n_before, n_tokens) if is_prefill and device.type == "cpu" else ()
    return AttentionContext(positions, 0, _rope(config, positions), mask, is_prefill, n_before, block_masks)


def _block_masks(mask: Tensor | None, n_before: int, n_tokens: int) -> tuple[Tensor, ...]:
    """Return the masks of a prefill by blocks of queries: parts of ``mask`` (B, H, T, S), or causal ones (T, S)."""
    n = PREFILL_QUERIES
    causal = torch.full((n, n), float("-inf")).triu(1)
    masks = []
    for start in range(0, n_tokens, n):
        n_keys = n_before + start + n
        block = F.pad(causal, (n_keys - n, 0)) if mask is None else mask[:, :, start : start + n, :n_keys].float()
        masks.append(block)
    return tuple(masks)


def isolated_attention_context(config: ModelConfig, document_positions: Tensor) -> AttentionContext:
    """Return the context of rows of several documents, in which a token attends to its own document only.

    The mask takes B T² values, B H T² with ALiBi, and is shared by all blocks.

    Args:
        document_positions: (B, T) integers, 0 where a document begins.
    """
    places = torch.arange(document_positions.shape[1], device=document_positions.device)
    begins = places - document_positions
    # (B, 1, T, S): query t sees the keys from the start of its document up to itself.
    hidden = (places > places[:, None]) | (places < begins[:, :, None])
    hidden = hidden.unsqueeze(1)
    if config.positional_encoding == "alibi":
        mask = alibi_bias(alibi_slopes(config.n_heads, places.device), places, places)
    else:
        mask = torch.zeros((), device=places.device)
    mask = mask.masked_fill(hidden, float("-inf"))
    rope = _rope(config, document_positions.unsqueeze(1))
    return AttentionContext(document_positions, 0, rope, mask, document_positions=document_positions)


def cached_attention_context(
    config: ModelConfig, offsets: Tensor, slots: Tensor, n_tokens: int, dtype: torch.dtype
) -> AttentionContext:
    """Return the context of rows that continue at ``offsets`` (B,), computed on the device without a host sync.

    Args:
        slots: (S,) the numbers 0 .. S-1 of the cache slots to read: at least the longest row with its new tokens.
        dtype: of the mask.
    """
    positions = offsets[:, None] + torch.arange(n_tokens, device=offsets.device)
    slopes = torch.zeros(config.n_heads, device=offsets.device)
    if config.positional_encoding == "alibi":
        slopes = alibi_slopes(config.n_heads, offsets.device)
        mask = alibi_bias(slopes, positions, slots)
    else:
        # (B, 1, T, S): query t sees the slots up to its own position.
        hidden = slots > positions[:, None, :, None]
        mask = torch.zeros(hidden.shape, device=offsets.device).masked_fill(hidden, float("-inf"))
    return AttentionContext(
        positions, slots.shape[0], _rope(config, positions.unsqueeze(1)), mask.to(dtype), slopes=slopes
    )


def _rope(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor] | None:
    if config.positional_encoding != "rope":
        return None
    return rope_tables(positions, config.d_model // config.n_heads, config.rope_theta)


class Attention(nn.Module):
    """Multi-head causal attention without biases, with grouped queries (arXiv 2305.13245) when G < H."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        self.head_dim = config.d_model // config.n_heads
        self.features = None
        if config.qkv_features is not None:
            self.features = QkvFeatures(config.d_model, config.qkv_features)
        self.q_proj = Linear(config.d_model, self.n_heads * self.head_dim, bias=False)
        self.k_proj = Linear(config.d_model, self.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = Linear(config.d_model, self.n_kv_heads * self.head_dim, bias=False)
        self.out_proj: nn.Module = Linear(self.n_heads * self.head_dim, config.d_model, bias=False)
        # Henry et al. 2020, arXiv 2010.04245, with RMSNorm and one scale per feature of a head.
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        # All three projections as one, in a model prepared for inference.
        self.qkv_proj: nn.Module | None = None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, T, H K or G K) of (B, T, D)."""
        if self.features is not None:
            x = self.features(x)
        if self.qkv_proj is None:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        sizes = [self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim, self.n_kv_heads * self.head_dim]
        q, k, v = self.qkv_proj(x).split(sizes, dim=-1)
        return q, k, v

    def _heads(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, T, K), keys and values (B, G, T, K) of x (B, T, D), normalized and rotated."""
        if self.qkv_proj is not None and self.q_norm is None and not torch.compiler.is_compiling():
            # Queries and keys lie side by side, so that one rotation does for both: a short pass is bound by the number
            # of its operations.
            projected = self.qkv_proj(x if self.features is None else self.features(x))
            heads = projected.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
            rotated, v = heads.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=1)
            if rope is not None:
                rotated = apply_rotary_emb(rotated, rope)
            q, k = rotated.split([self.n_heads, self.n_kv_heads], dim=1)
            return q, k, v
        queries, keys, values = self.project(x)
        q = queries.view(*x.shape[:2], self.n_heads, self.head_dim).transpose(1, 2)
        k = keys.view(*x.shape[:2], self.n_kv_heads, self.head_dim).transpose(1, 2)
        v = values.view(*x.shape[:2], self.n_kv_heads, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            # Mean squares in float32, as in every other norm, where the projections are bfloat16.
            q, k = self.q_norm(q.float()).to(q.dtype), self.k_norm(k.float()).to(k.dtype)
        if rope is not None:
            q, k = apply_rotary_emb(q, rope), apply_rotary_emb(k, rope)
        return q, k, v

    def forward(self, x: Tensor, context: AttentionContext, cache: LayerCache | None = None) -> Tensor:
        """Map (B, T, D) to (B, T, D); with a ``cache``, write the new keys and values into it first."""
        q, k, v = self._heads(x, context.rope)
        if cache is not None:
            k, v = _update_cache(cache, k, v, context)
        if cache is not None and context.slopes is not None and calls_cpp(x.device):
            y = few_query_attention(q.float(), cache.keys, cache.values, context.positions, context.slopes)
        else:
            y = self._attend(q, k, v, context).transpose(1, 2)
        out: Tensor = self.out_proj(y.flatten(-2))
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Return softmax(q kᵀ / √K + mask) v for q (B, H, T, K), k and v (B, G, S, K), which may have another dtype.

        Every branch computes this formula; the table in ``psannlm.kernels`` lists which one runs where.
        """
        is_decoding = context.kv_len > 0 and q.shape[2] <= MAX_DECODE_TOKENS
        if is_decoding and torch.compiler.is_compiling():
            return self._attend_reduction(q, k, v, context)
        if context.is_prefill and not q.is_cuda:
            return self._attend_prefill_blocks(q, k, v, context)
        if not context.kv_len and use_blocked_attention(q):
            return blocked_attention(q, k, v, context.mask)
        dtype = q.dtype
        if is_decoding and not q.is_cuda:
            # On a CPU the bfloat16 kernel is several times slower for few queries than widening what it would read.
            q, k, v = q.float(), k.float(), v.float()
        elif q.dtype != k.dtype:
            q = q.to(k.dtype)
        mask = None if context.mask is None else context.mask.to(q.dtype)
        if mask is not None and is_decoding and q.shape[2] > 1 and not q.is_cuda:
            # Each query as a head of its own. With several queries the kernel sums in another order than with one, and
            # a token must get the same result decoded alone or verified among draft tokens.
            mask = mask.expand(-1, self.n_heads, -1, -1).flatten(1, 2).unsqueeze(2)
            by_query = F.scaled_dot_product_attention(q.flatten(1, 2).unsqueeze(2), k, v, mask, enable_gqa=True)
            return by_query.view(q.shape).to(dtype)
        y = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None and q.shape[2] > 1, enable_gqa=self.n_kv_heads != self.n_heads
        )
        return y.to(dtype)

    def _attend_prefill_blocks(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Return the same for the queries of a prompt: ``PREFILL_QUERIES`` at a time over the keys up to them."""
        wide_q, k, v = q.float(), k.float(), v.float()
        n = PREFILL_QUERIES
        y = torch.empty_like(wide_q)
        for block, mask in enumerate(context.block_masks):
            queries = slice(block * n, (block + 1) * n)
            n_keys = mask.shape[-1]
            y[:, :, queries] = F.scaled_dot_product_attention(
                wide_q[:, :, queries],
                k[:, :, :n_keys],
                v[:, :, :n_keys],
                mask,
                enable_gqa=self.n_kv_heads != self.n_heads,
            )
        return y.to(q.dtype)

    def _attend_reduction(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Return the same as float32 reductions, which a compiler fuses into one pass over keys and one over values."""
        assert context.mask is not None
        shape = (q.shape[0], self.n_kv_heads, self.n_heads // self.n_kv_heads, q.shape[2])
        # Without `realize` the compiler would recompute the rotation of a query for every key, and an exponential for
        # every value.
        grouped = realize(q.float()).view(*shape, 1, self.head_dim)
        # scores[h, t, s] = sum over K of q[h, t] k[s] / sqrt(K)
        scores = (grouped * k.float()[:, :, None, None]).sum(-1).flatten(1, 2) * self.head_dim**-0.5
        scores = scores + context.mask.float()
        weights = realize((scores - scores.amax(-1, keepdim=True)).exp())
        # y[h, t] = sum over S of weights[h, t, s] v[s], divided by the sum of the weights
        y = (weights.view(*shape, -1, 1) * v.float()[:, :, None, None]).sum(-2).flatten(1, 2)
        normalized: Tensor = (y / weights.sum(-1, keepdim=True)).to(q.dtype)
        return normalized


def _update_cache(cache: LayerCache, k: Tensor, v: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
    """Write new keys and values (B, G, T, K) into ``cache``; return those that attention reads, (B, G, S, K)."""
    if not context.kv_len:
        first, end = context.n_before, context.n_before + k.shape[2]
        cache.keys[:, :, first:end] = k
        cache.values[:, :, first:end] = v
        # Read back in the dtype of the cache, so that results do not depend on how a prompt was split into passes.
        return cache.keys[:, :, :end], cache.values[:, :, :end]
    rows = torch.arange(k.shape[0], device=k.device)[:, None]
    cache.keys[rows, :, context.positions] = k.transpose(1, 2).to(cache.keys.dtype)
    cache.values[rows, :, context.positions] = v.transpose(1, 2).to(cache.values.dtype)
    return cache.keys[:, :, : context.kv_len], cache.values[:, :, : context.kv_len]

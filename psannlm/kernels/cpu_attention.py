"""Causal attention of training on a CPU, in blocks of queries over the keys up to the end of each block.

torch's CPU kernel multiplies one head at a time, in narrow products. Here the products of a block span all heads, in
bfloat16 except for the scores, which are float32 as in the kernel; compiled, also all in float32. Uncompiled, the
backward pass keeps the attention weights of short windows and recomputes those of long ones, so that memory does not
grow with the square of a long window. The formulas are those of FlashAttention's blocks (Dao et al. 2022, arXiv
2205.14135). Letters as in ``psannlm.models``; BH is B * H, and S equals T.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from psannlm.kernels.torch_private import softmax_backward

# Queries per block. Smaller blocks skip more of the masked half, but add more calls than that saves.
_BLOCK_QUERIES = 128
# Windows of up to this many times K tokens keep their weights for the backward pass; these then take at most as many
# bytes as inputs and output.
_MAX_KEPT_RATIO = 4
# Longest window that is compiled: the compiler unrolls every block of every layer, and may keep all weights.
_MAX_COMPILED_TOKENS = 1024


def use_blocked_attention(q: Tensor) -> bool:
    """Whether to use :func:`blocked_attention` for queries (B, H, T, K): training on a CPU.

    In bfloat16, and compiled in float32 too: uncompiled, torch's kernel is as fast there. Compiled, only windows of up
    to ``_MAX_COMPILED_TOKENS``.
    """
    if q.device.type != "cpu" or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    if torch.compiler.is_compiling():
        return q.dtype in (torch.bfloat16, torch.float32) and q.shape[2] <= _MAX_COMPILED_TOKENS
    return q.dtype == torch.bfloat16


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return causal softmax attention (B, H, T, K) of queries of that shape, bfloat16 or, compiled, also float32.

    Args:
        k, v: (B, G, T, K), where G divides H: each head is shared by H / G consecutive query heads.
        bias: (B or 1, H or 1, T, T), added to the scores, minus infinity where a key is masked; None: only the causal
            mask. It gets no gradient.
    """
    # The dtype of each product is chosen below, not by autocast.
    with torch.autocast("cpu", enabled=False):
        if torch.compiler.is_compiling():
            return _blocked_attention_compilable(q, k, v, bias)
        y: Tensor = _BlockedAttention.apply(q, k, v, bias)  # type: ignore[no-untyped-call]
    return y


def _blocks(n_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield the start and the end of each block of queries."""
    for start in range(0, n_tokens, _BLOCK_QUERIES):
        yield start, min(start + _BLOCK_QUERIES, n_tokens)


def _mask(bias: Tensor | None, start: int, end: int) -> Tensor:
    """Return what is added to a block's scores, broadcastable to (B, H, end - start, end), float32."""
    if bias is not None:
        return bias[:, :, start:end, :end].float()
    # Queries start .. end - 1 see all keys before the block, and within it those up to their own position.
    causal = torch.full((end - start, end - start), float("-inf")).triu_(1)
    return F.pad(causal, (start, 0))


def _blocked_attention_compilable(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Return the same without in-place operations, for a compiler, which fuses the work around the products."""
    # Per block: weights = softmax(q kᵀ / √K + mask) in float32, y = weights v in the dtype of v.
    k, v = _for_each_head(k, q.shape[1]), _for_each_head(v, q.shape[1])
    with torch.no_grad():
        wide_q, wide_k = q.float() * q.shape[-1] ** -0.5, k.float()
    outputs = []
    for start, end in _blocks(q.shape[2]):
        rows, keys = slice(start, end), slice(None, end)
        weights: Tensor = _CompilableWeights.apply(  # type: ignore[no-untyped-call]
            q[:, :, rows], k[:, :, keys], wide_q[:, :, rows], wide_k[:, :, keys], _mask(bias, start, end)
        )
        outputs.append(weights @ v[:, :, keys])
    return torch.cat(outputs, dim=2)


class _CompilableWeights(torch.autograd.Function):
    """Attention weights (B, H, n, S) of a block of n queries, rounded to their dtype; gradients in it too.

    A derivative of the float32 scores would multiply in float32 in the backward pass, at a third of the rate.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, wide_q: Tensor, wide_k: Tensor, mask: Tensor) -> Tensor:
        weights = torch.softmax(wide_q @ wide_k.transpose(-1, -2) + mask, -1).to(q.dtype)
        ctx.save_for_backward(q, k, weights)
        return weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, weights = ctx.saved_tensors
        # With P = weights and S = scores before the softmax:
        # dL/dS = P * (dL/dP - sum(dL/dP * P)),  dL/dq = dL/dS k / √K,  dL/dk = (dL/dS)ᵀ q / √K
        grad, wide = grads[0].float(), weights.float()
        grad_scores = (wide * (grad - (grad * wide).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5).to(q.dtype)
        return grad_scores @ k, grad_scores.transpose(-1, -2) @ q, None, None, None


def _for_each_head(x: Tensor, n_heads: int) -> Tensor:
    """Return (B, G, T, K) repeated to (B, H, T, K)."""
    n_shared = n_heads // x.shape[1]
    return x if n_shared == 1 else x.repeat_interleave(n_shared, dim=1)


class _BlockedAttention(torch.autograd.Function):
    """The same on (B, H, T, K), with its own backward pass: saves inputs, and the weights of short windows."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        n_rows, n_heads, n_tokens, head_dim = q.shape
        saved = (q, k, v)
        q, k, v = (_for_each_head(x, n_heads).reshape(-1, n_tokens, head_dim) for x in saved)
        ctx.is_kept = n_tokens <= _MAX_KEPT_RATIO * head_dim
        # Scores are float32 products; the queries carry their scale 1 / √K.
        wide_q, wide_k = q.float().mul_(head_dim**-0.5), k.float()
        # In memory (B, T, H, K), the layout that the output projection reads.
        y = q.new_empty(n_rows, n_tokens, n_heads, head_dim).transpose(1, 2)
        kept = []
        for start, end in _blocks(n_tokens):
            weights = _weights(wide_q, wide_k, bias, n_heads, start, end)
            # weights = softmax(q kᵀ / √K + mask),  y = weights v
            y[:, :, start:end] = torch.bmm(weights, v[:, :end]).view(n_rows, n_heads, end - start, head_dim)
            if ctx.is_kept:
                kept.append(weights)
        ctx.save_for_backward(*saved, bias, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved_q, saved_k, saved_v, bias, *kept = ctx.saved_tensors
        _, n_heads, n_tokens, head_dim = saved_q.shape
        with torch.autocast("cpu", enabled=False):
            scale = head_dim**-0.5
            grad, q, k, v = (
                _for_each_head(x, n_heads).reshape(-1, n_tokens, head_dim)
                for x in (grads[0], saved_q, saved_k, saved_v)
            )
            if not ctx.is_kept:
                wide_q, wide_k = q.float().mul_(scale), k.float()
            grad_q = torch.empty_like(q)
            # Summed over blocks of queries, hence float32.
            grad_k, grad_v = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
            for block, (start, end) in enumerate(_blocks(n_tokens)):
                weights = kept[block] if ctx.is_kept else _weights(wide_q, wide_k, bias, n_heads, start, end)
                # With P = weights and S = scores before the softmax:
                # dL/dP = dL/dy vᵀ,  dL/dS = P * (dL/dP - sum(dL/dP * P)),
                # dL/dv = Pᵀ dL/dy,  dL/dq = dL/dS k / √K,  dL/dk = (dL/dS)ᵀ q / √K
                grad_weights = torch.bmm(grad[:, start:end], v[:, :end].transpose(1, 2))
                grad_scores = softmax_backward(grad_weights, weights)
                grad_v[:, :end] += torch.bmm(weights.transpose(1, 2), grad[:, start:end])
                grad_q[:, start:end] = torch.bmm(grad_scores, k[:, :end])
                grad_k[:, :end] += torch.bmm(grad_scores.transpose(1, 2), q[:, start:end])
            return (
                grad_q.mul_(scale).view(saved_q.shape),
                _sum_of_heads(grad_k.mul_(scale), saved_k),
                _sum_of_heads(grad_v, saved_v),
                None,
            )


def _sum_of_heads(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of ``x`` (B, G, T, K) from that of its repeated heads, float32 (BH, T, K)."""
    # Heads that share a key/value head add their gradients.
    by_group = grad.view(*x.shape[:2], -1, *x.shape[2:])
    return (by_group.squeeze(2) if by_group.shape[2] == 1 else by_group.sum(2)).to(x.dtype)


def _weights(wide_q: Tensor, wide_k: Tensor, bias: Tensor | None, n_heads: int, start: int, end: int) -> Tensor:
    """Return the bfloat16 weights (BH, end - start, end) of a block, from float32 queries, already scaled, and keys."""
    # softmax((q / √K) kᵀ + mask), in float32, rounded for the product with v
    scores = torch.bmm(wide_q[:, start:end], wide_k[:, :end].transpose(1, 2))
    if bias is None:
        # Only the block on the diagonal has masked keys.
        scores[:, :, start:] += _mask(None, 0, end - start)
    else:
        scores.view(-1, n_heads, *scores.shape[1:]).add_(_mask(bias, start, end))
    return torch.softmax(scores, -1).to(torch.bfloat16)

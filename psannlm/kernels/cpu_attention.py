"""Causal attention of bfloat16 training on a CPU, by blocks of queries, each over the keys up to its own end.

torch's kernel for CPUs takes twice as long there: its products are narrow, one head's at a time. Here a block's go over
all heads at once, in bfloat16 but for the scores, which are float32 as in the kernel. What autograd keeps are the
weights of short windows; those of long ones are worked out again, so that nothing grows with the square of a long one.
The algebra is that of FlashAttention's blocks (Dao et al. 2022, arXiv 2205.14135). Letters: B rows, H query
heads, G key/value heads, N rows times query heads, T tokens, K head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Queries of a block; narrower ones repeat more of the small work around the products than they save of them.
_QUERIES = 128
# Windows up to this many times K keep their weights for the backward pass: as many bytes as inputs and output, at most.
_MOST_KEPT = 4
# Longest window that a compiler is given: it writes out every block of every layer, and may keep all weights.
_MOST_COMPILED = 1024


def use_blocked_attention(q: Tensor) -> bool:
    """Whether to take this way for queries (B, H, T, K): bfloat16 on a CPU, gradients wanted."""
    is_training = q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled()
    if not is_training or torch.is_inference_mode_enabled():
        return False
    return not torch.compiler.is_compiling() or q.shape[2] <= _MOST_COMPILED


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return causal softmax attention (B, H, T, K) of bfloat16 queries of that shape.

    Args:
        k, v: (B, G, T, K), where G divides H: each stands for H / G heads that follow one another.
        bias: (B or 1, H or 1, T, T) to add to the scores, minus infinity where a key may not be seen; None: nothing but
            the causal mask. It gets no gradient.
    """
    with torch.autocast("cpu", enabled=False):
        if torch.compiler.is_compiling():
            return _blocked_attention_compilable(q, k, v, bias)
        y: Tensor = _BlockedAttention.apply(q, k, v, bias)  # type: ignore[no-untyped-call]
    return y


def _spans(n_tokens: int) -> Iterator[tuple[int, int]]:
    """Where each block of queries begins and ends."""
    for start in range(0, n_tokens, _QUERIES):
        yield start, min(start + _QUERIES, n_tokens)


def _mask(bias: Tensor | None, start: int, end: int) -> Tensor:
    """What to add to a block's scores, broadcastable to (B, H, end - start, end), float32."""
    if bias is not None:
        return bias[:, :, start:end, :end].float()
    ahead = torch.full((end - start, end - start), float("-inf")).triu_(1)
    return F.pad(ahead, (start, 0))


def _blocked_attention_compilable(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """What a compiler fuses around the products."""
    k, v = _for_each_head(k, q.shape[1]), _for_each_head(v, q.shape[1])
    wide_q, wide_k = q.float() * q.shape[-1] ** -0.5, k.float()
    mixed = []
    for start, end in _spans(q.shape[2]):
        scores = wide_q[:, :, start:end] @ wide_k[:, :, :end].transpose(-1, -2)
        weights = torch.softmax(scores + _mask(bias, start, end), -1).to(v.dtype)
        mixed.append(weights @ v[:, :, :end])
    return torch.cat(mixed, dim=2)


def _for_each_head(x: Tensor, n_heads: int) -> Tensor:
    """(B, G, T, K) as (B, H, T, K)."""
    n_shared = n_heads // x.shape[1]
    return x if n_shared == 1 else x.repeat_interleave(n_shared, dim=1)


class _BlockedAttention(torch.autograd.Function):
    """The same, of (B, H, T, K), with what it keeps and each pass over the scores written out."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        n_rows, n_heads, n_tokens, head_dim = q.shape
        saved = (q, k, v)
        q, k, v = (_for_each_head(x, n_heads).reshape(-1, n_tokens, head_dim) for x in saved)
        ctx.is_kept = n_tokens <= _MOST_KEPT * head_dim
        wide_q, wide_k = q.float().mul_(head_dim**-0.5), k.float()
        # Laid out as the projection after it reads it: (B, T, H, K).
        mixed = q.new_empty(n_rows, n_tokens, n_heads, head_dim).transpose(1, 2)
        kept = []
        for start, end in _spans(n_tokens):
            weights = _weights(wide_q, wide_k, bias, n_heads, start, end)
            mixed[:, :, start:end] = torch.bmm(weights, v[:, :end]).view(n_rows, n_heads, end - start, head_dim)
            if ctx.is_kept:
                kept.append(weights)
        ctx.save_for_backward(*saved, bias, *kept)
        return mixed

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
            grad_k, grad_v = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
            for block, (start, end) in enumerate(_spans(n_tokens)):
                weights = kept[block] if ctx.is_kept else _weights(wide_q, wide_k, bias, n_heads, start, end)
                by_weight = torch.bmm(grad[:, start:end], v[:, :end].transpose(1, 2))
                by_score = torch._softmax_backward_data(by_weight, weights, -1, weights.dtype)
                grad_v[:, :end] += torch.bmm(weights.transpose(1, 2), grad[:, start:end])
                grad_q[:, start:end] = torch.bmm(by_score, k[:, :end])
                grad_k[:, :end] += torch.bmm(by_score.transpose(1, 2), q[:, start:end])
            return (
                grad_q.mul_(scale).view(saved_q.shape),
                _sum_of_heads(grad_k.mul_(scale), saved_k),
                _sum_of_heads(grad_v, saved_v),
                None,
            )


def _sum_of_heads(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``x`` (B, G, T, K) from the float32 (N, T, K) of what stood for it."""
    by_group = grad.view(*x.shape[:2], -1, *x.shape[2:])
    return (by_group.squeeze(2) if by_group.shape[2] == 1 else by_group.sum(2)).to(x.dtype)


def _weights(wide_q: Tensor, wide_k: Tensor, bias: Tensor | None, n_heads: int, start: int, end: int) -> Tensor:
    """The (N, end - start, end) bfloat16 weights of a block, from float32 queries, scaled already, and keys."""
    scores = torch.bmm(wide_q[:, start:end], wide_k[:, :end].transpose(1, 2))
    if bias is None:
        scores[:, :, start:] += _mask(None, 0, end - start)
    else:
        scores.view(-1, n_heads, *scores.shape[1:]).add_(_mask(bias, start, end))
    return torch.softmax(scores, -1).to(torch.bfloat16)

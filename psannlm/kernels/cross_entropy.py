"""Hidden states and labels to the summed cross-entropy, never holding the logits of all tokens at once.

Letters: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psannlm.config.constants import IGNORE_INDEX
from psannlm.kernels.compile import compiled, use_compiled_kernels
from psannlm.kernels.onednn import matmul_nt, matmul_tn

# Bytes of float32 logits worked on at a time; larger chunks gain nothing, smaller ones lose to the call overhead. On a
# GPU a chunk of 8 MiB is done before the next one could be launched.
_CHUNK_BYTES = 8 << 20
_CHUNK_BYTES_ON_GPU = 128 << 20
# Tokens whose logits a head of another kind works out at once.
_HEAD_ROWS = 512


def _chunk_loss_in_place(
    logits: Tensor, labels: Tensor, label_smoothing: float, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the summed loss of logits (n, V) and its gradient in their dtype, with few passes over memory of its own.

    Works in place where logits are float32.
    """
    spread = label_smoothing / logits.shape[1]
    counts = labels != IGNORE_INDEX
    index = labels.clamp(min=0).unsqueeze(1)
    wide = logits.float()
    wide.sub_(wide.amax(1, keepdim=True))
    loss = (label_smoothing - 1.0) * wide.gather(1, index).squeeze(1)
    if label_smoothing:
        loss = loss - spread * wide.sum(1)
    grad = wide.exp_()
    norm = grad.sum(1)
    total = torch.where(counts, loss + norm.log(), 0.0).sum()
    if not wants_gradient:
        return total, None
    grad.mul_((counts / norm).unsqueeze(1))
    if label_smoothing:
        grad.sub_(spread * counts.unsqueeze(1))
    grad.scatter_add_(1, index, ((label_smoothing - 1.0) * counts).unsqueeze(1))
    return total, grad.to(logits.dtype)


def _chunk_loss_compilable(
    logits: Tensor, labels: Tensor, label_smoothing: float, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The same as plain tensor algebra, which a compiler fuses: logits are read, and their gradient is written."""
    spread = label_smoothing / logits.shape[1]
    counts = labels != IGNORE_INDEX
    index = labels.clamp(min=0).unsqueeze(1)
    wide = logits.float()
    shifted = wide - wide.amax(1, keepdim=True)
    powers = shifted.exp()
    norm = powers.sum(1)
    loss = norm.log() + (label_smoothing - 1.0) * shifted.gather(1, index).squeeze(1)
    if label_smoothing:
        loss = loss - spread * shifted.sum(1)
    total = torch.where(counts, loss, 0.0).sum()
    if not wants_gradient:
        return total, None
    # Compared rather than scattered into, which would have to wait until all else is in memory.
    is_target = torch.arange(logits.shape[1], device=logits.device) == index
    grad = powers / norm.unsqueeze(1) - spread + (label_smoothing - 1.0) * is_target
    return total, torch.where(counts.unsqueeze(1), grad, 0.0).to(logits.dtype)


@lru_cache(maxsize=1)
def _compiled() -> Callable[[Tensor, Tensor, float, bool], tuple[Tensor, Tensor | None]]:
    return compiled(_chunk_loss_compilable)


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of the cross-entropy of softmax(hidden @ weight.T), by chunks of tokens.

    The gradients are worked out in the forward pass while a chunk's logits exist, and only scaled in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float, matmul_dtype: torch.dtype
    ) -> Tensor:
        n_tokens, vocab_size = hidden.shape[0], weight.shape[0]
        chunk = max(64, (_CHUNK_BYTES_ON_GPU if hidden.is_cuda else _CHUNK_BYTES) // (4 * vocab_size))
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_low, weight_low = hidden.to(matmul_dtype), weight.to(matmul_dtype)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        work = _compiled() if use_compiled_kernels(hidden) else _chunk_loss_in_place
        for start in range(0, n_tokens, chunk):
            rows = hidden_low[start : start + chunk]
            part = labels[start : start + chunk]
            loss, grad = work(matmul_nt(rows, weight_low), part, label_smoothing, wants_hidden or wants_weight)
            total += loss
            if grad is None:
                continue
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = matmul_nt(grad, weight_low.t())
            if grad_weight is not None:
                grad_weight += matmul_tn(grad, rows)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of ``softmax(hidden @ weight.T)`` summed over the labels that are not IGNORE_INDEX.

    Args:
        hidden: (N, D). weight: (V, D). labels: (N,) int64, in 0..V-1 or IGNORE_INDEX.
        label_smoothing: share of the target's mass spread evenly over the vocabulary (arXiv 1512.00567).

    Returns:
        A float32 scalar, in nats. The products run in bfloat16 under a bfloat16 autocast, else in float32; log-sum-exp
        and the sum always in float32.
    """
    device = hidden.device.type
    matmul_dtype = torch.float32
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        matmul_dtype = torch.bfloat16
    if not torch.is_grad_enabled():
        # Autograd asks a function for the gradients of all parameters, even where none will ever be taken.
        hidden, weight = hidden.detach(), weight.detach()
    with torch.autocast(device, enabled=False):
        total: Tensor = _ChunkedLinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, weight, labels, label_smoothing, matmul_dtype
        )
    return total


def chunked_cross_entropy(hidden: Tensor, head: nn.Module, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return what :func:`linear_cross_entropy` does for an output layer of any kind, such as one packed for inference.

    Args:
        head: maps (1, n, D) to logits (1, n, V).
    """
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, hidden.shape[0], _HEAD_ROWS):
        logits = head(hidden[None, start : start + _HEAD_ROWS])[0].float()
        target = labels[start : start + _HEAD_ROWS]
        total = total + F.cross_entropy(
            logits, target, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=label_smoothing
        )
    return total

"""Cross-entropy of a linear output layer in chunks of tokens, without the logits of all tokens in memory.

Letters as in ``psannlm.models``; M is the number of tokens, and m that of a chunk.
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
from psannlm.kernels.torch_private import uncompiled

# Bytes of the float32 logits of a chunk. Larger chunks gain nothing on a CPU, smaller ones lose to call overhead. A GPU
# would finish a chunk of 8 MiB before the next one is launched.
_CHUNK_BYTES = 8 << 20
_CHUNK_BYTES_ON_GPU = 128 << 20
# Tokens per chunk of `chunked_cross_entropy`.
_HEAD_ROWS = 512


def _chunk_loss_in_place(
    logits: Tensor, labels: Tensor, label_smoothing: float, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the summed loss of logits (m, V) and its gradient in their dtype, overwriting float32 logits.

    With p = softmax(x), target t, smoothing e and every label weighing 1, or 0 where it is IGNORE_INDEX:
    loss = log(sum(exp(x))) - (1 - e) x[t] - e mean(x), and d loss / d x = p - (1 - e) onehot(t) - e / V.
    """
    spread = label_smoothing / logits.shape[1]
    counts = labels != IGNORE_INDEX
    # Any valid index does for an ignored label: its row of the gradient is zero.
    index = labels.clamp(min=0).unsqueeze(1)
    wide = logits.float()
    # x - max(x): the loss does not change, and exp cannot overflow.
    wide.sub_(wide.amax(1, keepdim=True))
    # - (1 - e) x[t] - e mean(x); log(sum(exp(x))) is added below, when the sum is known.
    loss = (label_smoothing - 1.0) * wide.gather(1, index).squeeze(1)
    if label_smoothing:
        loss = loss - spread * wide.sum(1)
    # exp(x) in the memory of x, and the sum that normalises it.
    grad = wide.exp_()
    norm = grad.sum(1)
    total = torch.where(counts, loss + norm.log(), 0.0).sum()
    if not wants_gradient:
        return total, None
    # p - e / V - (1 - e) onehot(t), and zero rows for ignored labels.
    grad.mul_((counts / norm).unsqueeze(1))
    if label_smoothing:
        grad.sub_(spread * counts.unsqueeze(1))
    grad.scatter_add_(1, index, ((label_smoothing - 1.0) * counts).unsqueeze(1))
    return total, grad.to(logits.dtype)


def _chunk_loss_compilable(
    logits: Tensor, labels: Tensor, label_smoothing: float, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the same without in-place operations, which a compiler fuses into one read and one write of (m, V)."""
    spread = label_smoothing / logits.shape[1]
    counts = labels != IGNORE_INDEX
    index = labels.clamp(min=0).unsqueeze(1)
    wide = logits.float()
    shifted = wide - wide.amax(1, keepdim=True)
    # p = exp(x - max) / sum(exp(x - max)); the gradient is p - e / V - (1 - e) onehot(t)
    powers = shifted.exp()
    norm = powers.sum(1)
    loss = norm.log() + (label_smoothing - 1.0) * shifted.gather(1, index).squeeze(1)
    if label_smoothing:
        loss = loss - spread * shifted.sum(1)
    total = torch.where(counts, loss, 0.0).sum()
    if not wants_gradient:
        return total, None
    # A comparison, because a scatter would end the fusion.
    is_target = torch.arange(logits.shape[1], device=logits.device) == index
    grad = powers / norm.unsqueeze(1) - spread + (label_smoothing - 1.0) * is_target
    return total, torch.where(counts.unsqueeze(1), grad, 0.0).to(logits.dtype)


@lru_cache(maxsize=1)
def _compiled() -> Callable[[Tensor, Tensor, float, bool], tuple[Tensor, Tensor | None]]:
    return compiled(_chunk_loss_compilable)


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of the cross-entropy of softmax(hidden @ weight.T), in chunks of tokens.

    Computes the gradients in the forward pass, while a chunk's logits exist; the backward pass only scales them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float, matmul_dtype: torch.dtype
    ) -> Tensor:
        n_tokens, vocab_size = hidden.shape[0], weight.shape[0]
        # At least 64 tokens, for products of a useful shape with a large vocabulary.
        chunk = max(64, (_CHUNK_BYTES_ON_GPU if hidden.is_cuda else _CHUNK_BYTES) // (4 * vocab_size))
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        # Cast once for all chunks. The gradient of the weight is summed over the chunks in float32.
        hidden_low, weight_low = hidden.to(matmul_dtype), weight.to(matmul_dtype)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        chunk_loss = _compiled() if use_compiled_kernels(hidden) else _chunk_loss_in_place
        for start in range(0, n_tokens, chunk):
            rows = hidden_low[start : start + chunk]
            chunk_labels = labels[start : start + chunk]
            loss, grad = chunk_loss(
                matmul_nt(rows, weight_low), chunk_labels, label_smoothing, wants_hidden or wants_weight
            )
            total += loss
            if grad is None:
                continue
            # logits = h Wᵀ:  dL/dh = dL/dlogits W,  dL/dW = (dL/dlogits)ᵀ h, summed over the chunks
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = matmul_nt(grad, weight_low.t())
            if grad_weight is not None:
                grad_weight += matmul_tn(grad, rows)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        # Computed in the forward pass for a loss gradient of 1.
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


@uncompiled
def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of ``softmax(hidden @ weight.T)`` summed over the labels that are not IGNORE_INDEX.

    Args:
        hidden: (M, D). weight: (V, D). labels: (M,) int64, in 0..V-1 or IGNORE_INDEX.
        label_smoothing: fraction of the target's probability spread evenly over the vocabulary (arXiv 1512.00567).

    Returns:
        A float32 scalar, in nats. The products run in bfloat16 under a bfloat16 autocast, else in float32; log-sum-exp
        and the sum always in float32.
    """
    device = hidden.device.type
    matmul_dtype = torch.float32
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        matmul_dtype = torch.bfloat16
    if not torch.is_grad_enabled():
        # `needs_input_grad` is true for parameters even under no_grad: detach, so that no gradient is computed.
        hidden, weight = hidden.detach(), weight.detach()
    with torch.autocast(device, enabled=False):
        total: Tensor = _ChunkedLinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, weight, labels, label_smoothing, matmul_dtype
        )
    return total


def chunked_cross_entropy(hidden: Tensor, head: nn.Module, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the same for an output layer of any kind, such as one prepared for inference.

    Args:
        head: maps (1, m, D) to logits (1, m, V).
    """
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, hidden.shape[0], _HEAD_ROWS):
        logits = head(hidden[None, start : start + _HEAD_ROWS])[0].float()
        target = labels[start : start + _HEAD_ROWS]
        total = total + F.cross_entropy(
            logits, target, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=label_smoothing
        )
    return total


def token_cross_entropy(hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
    """Return the cross-entropy of each label, (M,) float32 in nats, and 0 where it is IGNORE_INDEX.

    Args:
        hidden: (M, D). labels: (M,) int64.
        head: maps (1, m, D) to logits (1, m, V).
    """
    losses = hidden.new_zeros(len(labels), dtype=torch.float32)
    for start in range(0, len(labels), _HEAD_ROWS):
        rows = slice(start, start + _HEAD_ROWS)
        logits = head(hidden[None, rows])[0].float()
        losses[rows] = F.cross_entropy(logits, labels[rows], ignore_index=IGNORE_INDEX, reduction="none")
    return losses

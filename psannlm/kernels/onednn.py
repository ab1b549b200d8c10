"""Float32 products on CPUs through oneDNN, where torch's own way (MKL) leaves half of the processor idle.

MKL keeps to AVX2 on processors that are not Intel's; oneDNN takes AVX-512 wherever it is. Both multiply and add in
float32. Which of them runs is settled by the processor's maker, never by a measurement: a run that is resumed must
find the same sums.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Rows from which on a product is worth the detour; below, decoding has ways of its own (models/packed.py).
_MANY_ROWS = 64


@lru_cache(maxsize=1)
def has_onednn() -> bool:
    """Whether torch offers oneDNN's product of plain float32 matrices on this CPU, and gets it right."""
    if not (torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    left, right = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(3, 4)
    try:
        return torch.equal(_product(left, right.t()), left @ right)
    except (RuntimeError, TypeError):  # the operator is not public: another torch may take other arguments
        return False


@lru_cache(maxsize=1)
def prefers_onednn() -> bool:
    """Whether float32 products go through oneDNN: an AMD processor with AVX-512, and a torch whose own way is MKL."""
    cpuinfo = Path("/proc/cpuinfo")
    try:
        description = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    has_what_it_takes = "AuthenticAMD" in description and "avx512f" in description
    return has_what_it_takes and torch._C.has_mkl and has_onednn()


def onednn_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` of float32 matrices (M, K) and (K, N), of any strides."""
    return _product(left, right.t())


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, K) times weight (N, K) transposed, plus bias (N,)."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def matmul_nt(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T`` of (M, K) and (N, K) in their dtype, by the faster way; for use inside a function."""
    if x.dtype == torch.float32 and len(x) >= _MANY_ROWS and is_dense_tensor(x) and prefers_onednn():
        return _product(x, weight)
    return x @ weight.t()


def matmul_tn(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left.T @ right`` of (M, N) and (M, K): the gradient of a weight."""
    if left.dtype == torch.float32 and len(left) >= _MANY_ROWS and is_dense_tensor(left) and prefers_onednn():
        # The first argument is copied to lie the other way round: let that be the smaller one.
        if left.shape[1] <= right.shape[1]:
            return _product(left.t(), right.t())
        return _product(right.t(), left.t()).t()
    return left.t() @ right


def is_dense_tensor(x: Tensor) -> bool:
    """Whether ``x`` holds numbers, on this device alone, rather than stands for others."""
    return type(x) in (Tensor, nn.Parameter)


class _OneDnnLinear(torch.autograd.Function):
    """``F.linear`` of float32 (M, K), (N, K) and perhaps (N,), all three products through oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            matmul_nt(grad, weight.t()) if needs_x else None,
            matmul_tn(grad, x) if needs_weight else None,
            grad.sum(0) if ctx.has_bias and needs_bias else None,
        )


def _use_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and is_dense_tensor(x)
        and x.numel() >= _MANY_ROWS * x.shape[-1]
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.is_grad_enabled()
        and prefers_onednn()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what ``F.linear`` does, of (..., K), (N, K) and (N,), by the faster way where gradients are wanted."""
    if not _use_onednn(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = _OneDnnLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., K) to (..., N)."""
        return linear(input, self.weight, self.bias)

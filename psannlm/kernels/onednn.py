"""Float32 matrix products on CPUs through oneDNN or torch's default (MKL), by the shape of each product.

MKL restricts itself to AVX2 on processors that are not Intel's; oneDNN uses AVX-512 wherever it exists. Both multiply
and add in float32. The processor and the shape decide which one runs, never a measurement: a resumed run must get the
same sums. Compiled code calls the same products through an operator of our own, ``psannlm::onednn_matmul``, because
the compiler has no other way to oneDNN for a weight that changes.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psannlm.kernels.torch_private import constant_while_compiling, has_onednn_linear, onednn_linear

# Rows from which oneDNN pays off here; decoding, with fewer, has products of its own (generation/quantize.py).
_MIN_ROWS = 64
# In compiled code oneDNN computes the gradient of a weight (Out, In) where In is at least this many times Out. It
# copies its first factor, the gradient (M, Out), to transpose it, and MKL does not (rates in docs/research/log.md,
# 2026-11-30).
_MIN_GRADIENT_RATIO = 2


@lru_cache(maxsize=1)
def has_onednn() -> bool:
    """Whether torch offers oneDNN's product of float32 matrices on this CPU, with the expected result."""
    if not has_onednn_linear():
        return False
    # Small whole numbers: exact in any order of summation.
    left, right = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(3, 4)
    try:
        return torch.equal(onednn_linear(left, right.t()), left @ right)
    except (RuntimeError, TypeError):  # the operator is private: another torch may take other arguments
        return False


@constant_while_compiling
def prefers_onednn() -> bool:
    """Whether float32 products use oneDNN: an AMD processor with AVX-512, and a torch built with MKL."""
    return _prefers_onednn()


@lru_cache(maxsize=1)
def _prefers_onednn() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    try:
        description = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    # Decided by the processor alone, as the module docstring explains. Without /proc (not Linux) MKL stays.
    is_amd_with_avx512 = "AuthenticAMD" in description and "avx512f" in description
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return is_amd_with_avx512 and has_mkl and has_onednn()


# Sums of products in an order that only this operator knows: opaque to a compiler, which must neither fuse nor copy.
torch.library.define("psannlm::onednn_matmul", "(Tensor left, Tensor right) -> Tensor")


@torch.library.impl("psannlm::onednn_matmul", "CPU")
def _onednn_matmul(left: Tensor, right: Tensor) -> Tensor:
    return onednn_linear(left, right.t())


@torch.library.register_fake("psannlm::onednn_matmul")  # type: ignore[untyped-decorator]
def _fake_matmul(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


def onednn_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` of float32 matrices (M, In) and (In, Out), of any strides; no gradient is recorded."""
    if torch.compiler.is_compiling():
        product: Tensor = torch.ops.psannlm.onednn_matmul(left, right)
        return product
    return onednn_linear(left, right.t())


def matmul_nt(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T`` of (M, In) and (Out, In) in their dtype, for use inside an autograd function."""
    if _fits_onednn(x):
        return onednn_matmul(x, weight.t())
    return x @ weight.t()


def matmul_tn(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left.T @ right`` of (M, Out) and (M, In): the gradient of a weight (Out, In)."""
    if not _fits_onednn(left):
        return left.t() @ right
    n_out, n_in = left.shape[1], right.shape[1]
    if torch.compiler.is_compiling():
        return onednn_matmul(left.t(), right) if n_in >= _MIN_GRADIENT_RATIO * n_out else left.t() @ right
    # Uncompiled: 1 % slower, with the sums that recorded losses have. oneDNN copies its first factor to transpose it:
    # the smaller one.
    if n_out <= n_in:
        return onednn_linear(left.t(), right.t())
    return onednn_linear(right.t(), left.t()).t()


def _fits_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and len(x) >= _MIN_ROWS and is_dense_tensor(x) and prefers_onednn()


def is_dense_tensor(x: Tensor) -> bool:
    """Whether ``x`` is a plain tensor or parameter, not a subclass such as a fake or distributed tensor."""
    return type(x) in (Tensor, nn.Parameter)


class _OneDnnLinear(torch.autograd.Function):
    """``F.linear`` of float32 (M, In), (Out, In) and optionally (Out,), each product through the faster library."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        if torch.compiler.is_compiling():
            y = onednn_matmul(x, weight.t())
            return y if bias is None else y + bias
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        # y = x Wᵀ + b:  dL/dx = dL/dy W,  dL/dW = (dL/dy)ᵀ x,  dL/db = sum of dL/dy over the rows
        return (
            matmul_nt(grad, weight.t()) if needs_x else None,
            matmul_tn(grad, x) if needs_weight else None,
            grad.sum(0) if ctx.has_bias and needs_bias else None,
        )


def _use_onednn(x: Tensor, weight: Tensor) -> bool:
    # Only in training: decoding reorders its weights beforehand, and autocast chooses its products itself. With few
    # rows the copies that oneDNN makes cost more than its faster products save.
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and is_dense_tensor(x)
        and x.numel() >= _MIN_ROWS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and torch.is_grad_enabled()
        and prefers_onednn()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``F.linear`` of (..., In), (Out, In) and (Out,), in training through oneDNN where that is faster."""
    if not _use_onednn(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = _OneDnnLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """``nn.Linear`` through :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., In) to (..., Out)."""
        return linear(input, self.weight, self.bias)

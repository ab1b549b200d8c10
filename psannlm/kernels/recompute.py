"""Training passes on a CPU that keep little and touch memory seldom: norm with short convolution, gate with projection.

Each is an autograd function that saves its inputs and works out again, in the backward pass, what costs less to work
out than to keep. Compilers and GPUs get the plain algebra instead, which they fuse themselves. Letters: B rows, T
tokens, D width, N tokens of all rows, F hidden features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from psannlm.kernels.damped_sine import DecayMode, gated_gradients, gated_value
from psannlm.kernels.onednn import matmul_nt, matmul_tn

_is_disabled = ContextVar("_is_disabled", default=False)


@contextmanager
def recompute_disabled() -> Iterator[None]:
    """Take none of these passes within the context: what is worked out on shapes is meant for another device."""
    token = _is_disabled.set(True)
    try:
        yield
    finally:
        _is_disabled.reset(token)


def use_recompute(x: Tensor) -> bool:
    """Whether to take these passes for ``x``: on a CPU, where gradients are wanted and no compiler is at work."""
    # A compiler is asked about first: it cannot trace the rest.
    return (
        not torch.compiler.is_compiling()
        and not _is_disabled.get()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
    )


def matmul_dtype() -> torch.dtype:
    """Return the dtype in which matrix products run now: bfloat16 under such an autocast, else float32."""
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
        return torch.bfloat16
    return torch.float32


def _no_autocast() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


class _NormConv(torch.autograd.Function):
    """conv(norm(x)) of float32 (B, T, D): keeps x and a number per token, and normalises again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, taps: Tensor | None, eps: float, dilation: int, dtype: torch.dtype
    ) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, taps, scale)
        ctx.dilation = dilation
        y = _normed(x, weight, scale)
        if taps is not None:
            y = _add_conv(y, taps, dilation)
        return y.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, taps, scale = ctx.saved_tensors
        with _no_autocast():
            grad = grads[0].float()
            grad_taps = None
            if taps is not None:
                grad_taps = _taps_gradient(grad, _normed(x, weight, scale), taps.shape[1], ctx.dilation)
                grad = _add_conv(grad, taps, ctx.dilation, is_backwards=True)
            by_input = grad * x
            along = (by_input @ weight).unsqueeze(-1).mul_(scale**3).div_(-x.shape[-1])
            grad_weight = scale.flatten() @ by_input.flatten(0, -2)
            grad_x = torch.mul(grad, weight, out=by_input).mul_(scale).addcmul_(x, along)
        return grad_x, grad_weight, grad_taps, None, None, None


def _normed(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return (x * scale).mul_(weight)


def _add_conv(h: Tensor, taps: Tensor, dilation: int, *, is_backwards: bool = False) -> Tensor:
    """h plus its causal convolution over time; backwards, over the time that follows."""
    n_taps = taps.shape[1]
    y = h * (1.0 + taps[:, -1])
    for tap in range(n_taps - 1):
        reach = (n_taps - 1 - tap) * dilation
        if reach < h.shape[1]:
            early, late = slice(None, -reach), slice(reach, None)
            into, source = (early, late) if is_backwards else (late, early)
            y[:, into].addcmul_(h[:, source], taps[:, tap])
    return y


def _taps_gradient(grad: Tensor, h: Tensor, n_taps: int, dilation: int) -> Tensor:
    """(D, taps): for every tap, the sum over tokens of the gradient times what the tap saw."""
    found = grad.new_zeros(n_taps, h.shape[-1])
    for tap in range(n_taps):
        reach = (n_taps - 1 - tap) * dilation
        if reach < h.shape[1]:
            found[tap] = (grad[:, reach:] * h[:, : h.shape[1] - reach]).sum((0, 1))
    return found.t()


def fused_norm_conv(x: Tensor, weight: Tensor, eps: float, taps: Tensor | None = None, dilation: int = 1) -> Tensor:
    """Return RMS norm, and where there are ``taps`` (D, kernel) x plus its short convolution, in the dtype of products.

    Args:
        x: (B, T, D) float32.
    """
    y: Tensor = _NormConv.apply(x, weight, taps, eps, dilation, matmul_dtype())  # type: ignore[no-untyped-call]
    return y


class _SineDown(torch.autograd.Function):
    """down(sine(z) * up) on (N, F), without ``up`` down(sine(z)): keeps z and up, not what follows from them."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, up: Tensor | None, weight: Tensor, a: Tensor, f: Tensor, d: Tensor, mode: DecayMode
    ) -> Tensor:
        ctx.save_for_backward(z, up, weight, a, f, d)
        ctx.mode = mode
        return matmul_nt(gated_value(z, up, a, f, d, mode), weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, up, weight, a, f, d = ctx.saved_tensors
        with _no_autocast():
            grad = grads[0].contiguous()
            grad_hidden = matmul_nt(grad, weight.t())
            # From here on grad_hidden holds the gradient of z: it was needed for nothing else.
            hidden, grad_up, by_parameter = gated_gradients(grad_hidden, z, up, a, f, d, ctx.mode)
            assert hidden is not None
            grad_weight = matmul_tn(grad, hidden)
        return grad_hidden, grad_up, grad_weight, *by_parameter, None


class _PlainDown(torch.autograd.Function):
    """The same with GELU or SiLU in the sine's place."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, up: Tensor | None, weight: Tensor, is_gelu: bool) -> Tensor:
        ctx.save_for_backward(z, up, weight)
        ctx.is_gelu = is_gelu
        hidden = F.gelu(z) if is_gelu else F.silu(z)
        return matmul_nt(hidden if up is None else hidden.mul_(up), weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, up, weight = ctx.saved_tensors
        with _no_autocast():
            grad = grads[0].contiguous()
            grad_hidden = matmul_nt(grad, weight.t())
            hidden, grad_up = F.gelu(z) if ctx.is_gelu else F.silu(z), None
            if up is not None:
                grad_up = grad_hidden * hidden
                hidden.mul_(up)
                grad_hidden.mul_(up)
            grad_weight = matmul_tn(grad, hidden)
            backward = torch.ops.aten.gelu_backward if ctx.is_gelu else torch.ops.aten.silu_backward
            return backward(grad_hidden, z), grad_up, grad_weight, None


def fused_sine_down_proj(
    z: Tensor, up: Tensor | None, weight: Tensor, parameters: tuple[Tensor, Tensor, Tensor], mode: DecayMode
) -> Tensor:
    """Return ``(damped_sine(z) * up) @ weight.T`` of (..., F) in the dtype of products; ``up`` None counts as one."""
    return _down(_SineDown, z, up, weight, *parameters, mode)


def fused_act_down_proj(z: Tensor, up: Tensor | None, weight: Tensor, *, is_gelu: bool) -> Tensor:
    """Return the same with GELU, else SiLU, for the sine."""
    return _down(_PlainDown, z, up, weight, is_gelu)


def _down(function: Any, z: Tensor, up: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
    dtype = z.dtype
    flat_up = None if up is None else up.reshape(-1, z.shape[-1])
    with _no_autocast():
        y: Tensor = function.apply(z.reshape(-1, z.shape[-1]), flat_up, weight.to(dtype), *rest)
    return y.view(*z.shape[:-1], -1)

"""Fused CPU training passes with recomputation: RMS norm with short convolution, activation with down-projection.

Each is an autograd function that saves its inputs and recomputes cheap intermediates in the backward pass. Compilers
and GPUs get the plain formulas, which they fuse themselves. Letters as in ``psannlm.models``; M is the number of tokens
of a batch.
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
from psannlm.kernels.torch_private import activation_backward

_is_disabled = ContextVar("_is_disabled", default=False)


@contextmanager
def recompute_disabled() -> Iterator[None]:
    """Use none of these passes within the context, as when memory is estimated for another device."""
    token = _is_disabled.set(True)
    try:
        yield
    finally:
        _is_disabled.reset(token)


def use_recompute(x: Tensor) -> bool:
    """Whether to use these passes for ``x``: uncompiled training on a CPU in float32 or bfloat16."""
    # Checked first: a compiler cannot trace the other conditions.
    return (
        not torch.compiler.is_compiling()
        and not _is_disabled.get()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
    )


def matmul_dtype() -> torch.dtype:
    """Return the dtype of matrix products at this point: bfloat16 under a bfloat16 autocast, else float32."""
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
        return torch.bfloat16
    return torch.float32


def _no_autocast() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


class _NormConv(torch.autograd.Function):
    """conv(norm(x)) of float32 (B, T, D); saves x and one scale per token, and recomputes the norm in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        taps: Tensor | None,
        eps: float,
        dilation: int,
        dtype: torch.dtype,
        document_positions: Tensor | None,
    ) -> Tensor:
        # scale = 1 / sqrt(mean(x²) + eps), one per token
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, taps, scale, document_positions)
        ctx.dilation = dilation
        # Norm and convolution in float32; the result is rounded once, to the dtype of the products.
        y = _normed(x, weight, scale)
        if taps is not None:
            y = _add_conv(y, taps, dilation, document_positions)
        return y.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, taps, scale, positions = ctx.saved_tensors
        with _no_autocast():
            grad = grads[0].float()
            grad_taps = None
            # Back through the convolution, whose input is the norm recomputed from x and scale.
            if taps is not None:
                grad_taps = _taps_gradient(grad, _normed(x, weight, scale), taps.shape[1], ctx.dilation, positions)
                grad = _add_conv(grad, taps, ctx.dilation, positions, is_backwards=True)
            # n = x scale weight. With G = dL/dn and r = scale:
            # dL/dx = G weight r - x r³ mean(G weight x),  dL/dweight = sum over tokens of G x r
            by_input = grad * x
            along = (by_input @ weight).unsqueeze(-1).mul_(scale**3).div_(-x.shape[-1])
            grad_weight = scale.flatten() @ by_input.flatten(0, -2)
            # `along` is -r³ mean(G weight x); by_input is overwritten by G weight.
            grad_x = torch.mul(grad, weight, out=by_input).mul_(scale).addcmul_(x, along)
        return grad_x, grad_weight, grad_taps, None, None, None, None


def _normed(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return the RMS norm of x, with the scale of each token already computed."""
    return (x * scale).mul_(weight)


def _add_conv(
    h: Tensor, taps: Tensor, dilation: int, document_positions: Tensor | None, *, is_backwards: bool = False
) -> Tensor:
    """Return h plus its causal convolution over time; with ``is_backwards`` the transposed operation."""
    n_taps = taps.shape[1]
    # y[t] = h[t] + sum over w of taps[w] h[t - (W - 1 - w) dilation]; the last tap reads h[t] itself. Transposed, each
    # gradient flows from t back to t - (W - 1 - w) dilation.
    y = h * (1.0 + taps[:, -1])
    for tap in range(n_taps - 1):
        # One multiply-add in place over all positions for each tap; taps beyond the window see zeros only.
        reach = (n_taps - 1 - tap) * dilation
        if reach < h.shape[1]:
            early, late = slice(None, -reach), slice(reach, None)
            into, source = (early, late) if is_backwards else (late, early)
            y[:, into].addcmul_(_inside(h[:, source], document_positions, reach), taps[:, tap])
    return y


def _inside(x: Tensor, document_positions: Tensor | None, reach: int) -> Tensor:
    """Return x (B, T - reach, D), zero where the tap of an output ``reach`` .. T - 1 reads another document."""
    if document_positions is None or not reach:
        return x
    # Output t reads input t - reach, which is of the same document where at least `reach` of its tokens precede t. The
    # gradient of output t flows back to that input, so that the transposed operation has the same mask.
    return x.where((document_positions[:, reach:] >= reach).unsqueeze(-1), 0)


def _taps_gradient(grad: Tensor, h: Tensor, n_taps: int, dilation: int, document_positions: Tensor | None) -> Tensor:
    """Return (D, W): for every tap, the sum over tokens of the gradient times the input that the tap reads."""
    # dL/dtaps[w] = sum over b, t of G[b, t] h[b, t - (W - 1 - w) dilation]
    found = grad.new_zeros(n_taps, h.shape[-1])
    for tap in range(n_taps):
        reach = (n_taps - 1 - tap) * dilation
        if reach < h.shape[1]:
            read = _inside(h[:, : h.shape[1] - reach], document_positions, reach)
            found[tap] = (grad[:, reach:] * read).sum((0, 1))
    return found.t()


def fused_norm_conv(
    x: Tensor,
    weight: Tensor,
    eps: float,
    taps: Tensor | None = None,
    dilation: int = 1,
    document_positions: Tensor | None = None,
) -> Tensor:
    """Return the RMS norm of ``x``, plus its short convolution where there are ``taps`` (D, W), in the products' dtype.

    Computes what ``models.short_conv.ShortConv`` computes from the start of a sequence, in one pass.

    Args:
        x: (B, T, D) float32.
        document_positions: (B, T) of each token in its document, which zeros precede; None: one document per row.
    """
    # Asked here, within the autocast region of the forward pass: the backward pass runs outside of it.
    dtype = matmul_dtype()
    y: Tensor = _NormConv.apply(  # type: ignore[no-untyped-call]
        x, weight, taps, eps, dilation, dtype, document_positions
    )
    return y


class _SineDownProj(torch.autograd.Function):
    """down(sine(z) * up) on (M, F), or down(sine(z)) without ``up``; saves z and up only."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, up: Tensor | None, weight: Tensor, a: Tensor, f: Tensor, d: Tensor, mode: DecayMode
    ) -> Tensor:
        # The product reads h = sine(z) up, which is not saved.
        ctx.save_for_backward(z, up, weight, a, f, d)
        ctx.mode = mode
        return matmul_nt(gated_value(z, up, a, f, d, mode), weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, up, weight, a, f, d = ctx.saved_tensors
        with _no_autocast():
            grad = grads[0].contiguous()
            # y = h Wᵀ:  dL/dh = dL/dy W,  dL/dW = (dL/dy)ᵀ h
            grad_hidden = matmul_nt(grad, weight.t())
            # Overwrites grad_hidden, dL/dh, with dL/dz, and recomputes h = sine(z) up for the gradient of the weight.
            hidden, grad_up, by_parameter = gated_gradients(grad_hidden, z, up, a, f, d, ctx.mode)
            assert hidden is not None
            grad_weight = matmul_tn(grad, hidden)
        return grad_hidden, grad_up, grad_weight, *by_parameter, None


class _ActDownProj(torch.autograd.Function):
    """The same with GELU or SiLU instead of the sine."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, up: Tensor | None, weight: Tensor, is_gelu: bool) -> Tensor:
        # The hidden vector, as large as z, is not kept: y = (act(z) up) Wᵀ needs z and up only to be made again.
        ctx.save_for_backward(z, up, weight)
        ctx.is_gelu = is_gelu
        hidden = F.gelu(z) if is_gelu else F.silu(z)
        return matmul_nt(hidden if up is None else hidden.mul_(up), weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, up, weight = ctx.saved_tensors
        with _no_autocast():
            grad = grads[0].contiguous()
            # y = h Wᵀ:  dL/dh = dL/dy W,  dL/dW = (dL/dy)ᵀ h
            grad_hidden = matmul_nt(grad, weight.t())
            # h = act(z) up:  dL/dup = dL/dh act(z),  dL/dz = dL/dh up act'(z)
            hidden, grad_up = F.gelu(z) if ctx.is_gelu else F.silu(z), None
            if up is not None:
                grad_up = grad_hidden * hidden
                hidden.mul_(up)
                grad_hidden.mul_(up)
            grad_weight = matmul_tn(grad, hidden)
            return activation_backward(grad_hidden, z, is_gelu=ctx.is_gelu), grad_up, grad_weight, None


def fused_sine_down_proj(
    z: Tensor, up: Tensor | None, weight: Tensor, parameters: tuple[Tensor, Tensor, Tensor], mode: DecayMode
) -> Tensor:
    """Return ``(damped_sine(z) * up) @ weight.T`` of (..., F) in the dtype of products; ``up`` None is 1."""
    return _down_proj(_SineDownProj, z, up, weight, *parameters, mode)


def fused_act_down_proj(z: Tensor, up: Tensor | None, weight: Tensor, *, is_gelu: bool) -> Tensor:
    """Return the same with GELU, or else SiLU, instead of the sine."""
    return _down_proj(_ActDownProj, z, up, weight, is_gelu)


def _down_proj(function: Any, z: Tensor, up: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
    dtype = z.dtype
    flat_up = None if up is None else up.reshape(-1, z.shape[-1])
    # z has the dtype of the products already; autocast would also cast the sine's float32 parameters.
    with _no_autocast():
        y: Tensor = function.apply(z.reshape(-1, z.shape[-1]), flat_up, weight.to(dtype), *rest)
    return y.view(*z.shape[:-1], -1)

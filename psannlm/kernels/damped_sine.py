"""The PSANN activation y = A exp(-d g(z)) sin(f z): one pass over memory each way, saving only z for the backward.

Sine networks train only when the argument of the sine has about unit variance (Sitzmann et al. 2020, arXiv 2006.09661);
here that is met by unit-variance pre-activations and f = 1 instead of their w0 = 30, and a damping is added.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from psannlm.kernels.compile import compiled, realize, use_compiled_kernels

DecayMode = Literal["abs", "relu", "none"]

# Rows summed at a time where the compiler makes sums over rows: it would walk down one column after the other.
_ROWS_SUMMED = 16
# Elements worked on at a time on a CPU, per thread: three float32 buffers of this size stay in the second-level cache.
_BLOCK_ELEMENTS = 65_536


def _envelope_argument(z: Tensor, mode: DecayMode) -> Tensor:
    return z.abs() if mode == "abs" else z.clamp(min=0.0)


def damped_sine_formula(z: Tensor, amplitude: Tensor, frequency: Tensor, decay: Tensor, mode: DecayMode) -> Tensor:
    """The activation as plain tensor algebra on (N, F); what torch.compile fuses into one kernel."""
    wide = z.float()
    y = amplitude * torch.sin(frequency * wide)
    if mode != "none":
        y = y * torch.exp(-decay * _envelope_argument(wide, mode))
    return y.to(z.dtype)


def _gradients(
    grad: Tensor, z: Tensor, amplitude: Tensor, frequency: Tensor, decay: Tensor, mode: DecayMode
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to z, A, f and d, as plain tensor algebra on (N, F).

    On a CPU the compiler would work out sine, cosine and envelope once for the gradient of z and once more for the
    sums: there the two products that all four are made of are realize, since reading them is cheaper.
    """
    wide = z.float()
    damped = grad.float()
    if mode != "none":
        damped = damped * torch.exp(-decay * _envelope_argument(wide, mode))
    phase = frequency * wide
    by_amplitude = damped * torch.sin(phase)
    by_phase = amplitude * damped * torch.cos(phase)
    if z.device.type == "cpu":
        by_amplitude, by_phase = realize(by_amplitude), realize(by_phase)
    grad_z = frequency * by_phase
    if mode == "none":
        grad_decay = torch.zeros_like(decay)
    else:
        slope = wide.sign() if mode == "abs" else (wide > 0).float()
        grad_z = grad_z - decay * slope * amplitude * by_amplitude
        grad_decay = -amplitude * _sum_of_rows(by_amplitude * _envelope_argument(wide, mode))
    return grad_z.to(z.dtype), _sum_of_rows(by_amplitude), _sum_of_rows(by_phase * wide), grad_decay


def _sum_of_rows(x: Tensor) -> Tensor:
    """Return the sum of (N, F) over N, on a CPU in two stages, of which the first reads whole rows."""
    n_rows, n_features = x.shape
    if x.device.type == "cpu" and n_rows % _ROWS_SUMMED == 0:
        x = x.view(-1, _ROWS_SUMMED, n_features).sum(1)
    return x.sum(0)


@lru_cache(maxsize=1)
def _compiled() -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]]:
    return compiled(damped_sine_formula, dynamic=True), compiled(_gradients, dynamic=True)


def _runs_in_blocks(z: Tensor) -> bool:
    # Where shapes alone are worked out (models/accounting.py) there is no memory to be gentle with, and in the widest
    # models there would be thousands of blocks.
    return not z.is_cuda and not isinstance(z, FakeTensor)


def _blocks(n_rows: int, n_features: int) -> range:
    return range(0, n_rows, max(1, _BLOCK_ELEMENTS * torch.get_num_threads() // n_features))


def _value_in_blocks(z: Tensor, amplitude: Tensor, frequency: Tensor, decay: Tensor, mode: DecayMode) -> Tensor:
    """``damped_sine_formula`` for a CPU: every intermediate lives in a buffer that stays in cache."""
    return gated_value(z, None, amplitude, frequency, decay, mode)


def gated_value(
    z: Tensor, up: Tensor | None, amplitude: Tensor, frequency: Tensor, decay: Tensor, mode: DecayMode
) -> Tensor:
    """Return the activation of (N, F) on a CPU, times ``up`` (N, F) where there is one, in z's dtype."""
    n_rows, n_features = z.shape
    blocks = _blocks(n_rows, n_features)
    out = torch.empty_like(z)
    if not _runs_in_blocks(z):
        return out
    is_narrow = z.dtype != torch.float32
    buffers = torch.empty(4, min(blocks.step, n_rows), n_features)
    against_decay = -decay
    for start in blocks:
        block, result = z[start : start + blocks.step], out[start : start + blocks.step]
        wide, sine, envelope, factor = buffers[:, : len(block)]
        if is_narrow:
            block = wide.copy_(block)
        torch.mul(block, frequency, out=sine).sin_().mul_(amplitude)
        if up is not None:
            by = up[start : start + blocks.step]
            sine.mul_(factor.copy_(by) if is_narrow else by)
        if mode != "none":
            sine.mul_(_envelope_into(envelope, block, against_decay, mode))
        result.copy_(sine)
    return out


def _envelope_into(envelope: Tensor, z: Tensor, against_decay: Tensor, mode: DecayMode) -> Tensor:
    torch.abs(z, out=envelope) if mode == "abs" else torch.clamp(z, min=0.0, out=envelope)
    return envelope.mul_(against_decay).exp_()


def _gradients_in_blocks(
    grad: Tensor, z: Tensor, amplitude: Tensor, frequency: Tensor, decay: Tensor, mode: DecayMode
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``_gradients`` for a CPU: every intermediate lives in a buffer that stays in cache."""
    grad_z = grad.clone()
    _, _, by_parameter = gated_gradients(grad_z, z, None, amplitude, frequency, decay, mode, wants_value=False)
    return grad_z, *by_parameter


def gated_gradients(
    grad: Tensor,
    z: Tensor,
    up: Tensor | None,
    amplitude: Tensor,
    frequency: Tensor,
    decay: Tensor,
    mode: DecayMode,
    *,
    wants_value: bool = True,
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor, Tensor]]:
    """Turn ``grad``, the gradient of what :func:`gated_value` returns, into that of z, in place.

    Returns:
        What :func:`gated_value` returned (None unless ``wants_value``), the gradient of ``up`` (None without one), and
        the gradients (F,) of amplitude, frequency and decay: one pass makes all of them.
    """
    n_rows, n_features = z.shape
    blocks = _blocks(n_rows, n_features)
    value = torch.empty_like(z) if wants_value else None
    grad_up = None if up is None else torch.empty_like(up)
    sums = torch.zeros(3, n_features)
    is_narrow = z.dtype != torch.float32
    buffers = torch.empty(7, min(blocks.step, n_rows), n_features)
    against_decay, slope, fall = -decay, amplitude * frequency, decay * amplitude
    for start in blocks:
        rows = slice(start, start + blocks.step)
        block, into = z[rows], grad[rows]
        wide, damped, by_sine, by_cosine, scratch, wide_up, wide_grad = buffers[:, : len(block)]
        gradient = into
        if is_narrow:
            block, gradient = wide.copy_(block), wide_grad.copy_(gradient)
        torch.mul(block, frequency, out=by_cosine)
        torch.sin(by_cosine, out=by_sine)
        by_cosine.cos_()
        if mode != "none":
            _envelope_into(damped, block, against_decay, mode)
            by_sine.mul_(damped)
            by_cosine.mul_(damped)
        # Now by_sine is the activation over its amplitude.
        factor: Tensor | None = None
        if up is not None and grad_up is not None:
            factor = wide_up.copy_(up[rows]) if is_narrow else up[rows]
        if value is not None or grad_up is not None:
            torch.mul(by_sine, amplitude, out=scratch)
            if grad_up is not None:
                _write_product(grad_up[rows], scratch, gradient, damped)
            if value is not None:
                value[rows].copy_(scratch) if factor is None else _write_product(value[rows], scratch, factor, damped)
        if factor is not None:
            gradient = torch.mul(gradient, factor, out=damped)
        by_sine.mul_(gradient)
        by_cosine.mul_(gradient)
        sums[0] += by_sine.sum(0)
        sums[1] += torch.mul(by_cosine, block, out=scratch).sum(0)
        by_cosine.mul_(slope)
        if mode != "none":
            torch.abs(block, out=scratch) if mode == "abs" else torch.clamp(block, min=0.0, out=scratch)
            sums[2] -= scratch.mul_(by_sine).sum(0)
            torch.sign(block, out=scratch) if mode == "abs" else torch.gt(block, 0.0, out=scratch)
            by_cosine.addcmul_(by_sine.mul_(fall), scratch, value=-1)
        into.copy_(by_cosine)
    return value, grad_up, (sums[0], sums[1].mul_(amplitude), sums[2].mul_(amplitude))


def _write_product(into: Tensor, left: Tensor, right: Tensor, scratch: Tensor) -> None:
    """Write left times right, of float32, into a tensor that may be narrower."""
    if into.dtype == torch.float32:
        torch.mul(left, right, out=into)
    else:
        into.copy_(torch.mul(left, right, out=scratch))


class _DampedSine(torch.autograd.Function):
    """The activation on (N, F) with float32 parameters (F,); saves z in its own dtype and nothing else of its size."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, amplitude: Tensor, frequency: Tensor, decay: Tensor, mode: DecayMode) -> Tensor:
        ctx.save_for_backward(z, amplitude, frequency, decay)
        ctx.mode = mode
        if torch.compiler.is_compiling():
            return damped_sine_formula(z, amplitude, frequency, decay, mode)
        if use_compiled_kernels(z):
            return _compiled()[0](z, amplitude, frequency, decay, mode)
        kernel = _value_in_blocks if _runs_in_blocks(z) else damped_sine_formula
        return kernel(z, amplitude, frequency, decay, mode)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        z, amplitude, frequency, decay = ctx.saved_tensors
        if torch.compiler.is_compiling():
            kernel = _gradients
        elif use_compiled_kernels(z):
            kernel = _compiled()[1]
        else:
            kernel = _gradients_in_blocks if _runs_in_blocks(z) else _gradients
        return (*kernel(grads[0], z, amplitude, frequency, decay, ctx.mode), None)


def damped_sine(z: Tensor, amplitude: Tensor, frequency: Tensor, decay: Tensor, mode: DecayMode = "abs") -> Tensor:
    """Return A exp(-d g(z)) sin(f z), with g(z) = ``|z|``, max(z, 0) or 0 for ``mode`` abs, relu or none.

    Args:
        z: (..., F), any floating dtype; the arithmetic is in float32, whatever the dtype of z or an autocast region.
        amplitude, frequency, decay: (F,), float32. Frequency is in radians per unit of z.

    Returns:
        (..., F) in z's dtype. Differentiable once in all four tensors; where z is 0, the slope of ``|z|`` counts as 0.
    """
    flat = z.reshape(-1, z.shape[-1])
    y: Tensor = _DampedSine.apply(flat, amplitude, frequency, decay, mode)  # type: ignore[no-untyped-call]
    return y.view(z.shape)

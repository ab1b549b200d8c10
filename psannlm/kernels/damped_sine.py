"""Damped sine activation y = A exp(-d g(z)) sin(f z), forward and backward, saving only z.

Sine networks train well when the argument of the sine has about unit variance (Sitzmann et al. 2020, arXiv 2006.09661).
Here unit-variance pre-activations and f = 1 give that, instead of their w0 = 30, and the exponential damping is added.
Letters as in ``psannlm.models``; M is the number of tokens. A is the amplitude, f the frequency, d the decay.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from psannlm.kernels.compile import compiled, realize, use_compiled_kernels
from psannlm.kernels.torch_private import FakeTensor

DecayMode = Literal["abs", "relu", "none"]

# Rows per partial sum in compiled code. Without the partial sums the compiler reads the matrix column by column.
_ROWS_SUMMED = 16
# Elements per block on a CPU, per thread: three float32 buffers of this size stay in the second-level cache.
_BLOCK_ELEMENTS = 65_536


def _envelope_argument(z: Tensor, mode: DecayMode) -> Tensor:
    """Return g(z): ``|z|`` for mode abs, max(z, 0) for relu."""
    return z.abs() if mode == "abs" else z.clamp(min=0.0)


def damp(y: Tensor, z: Tensor, decay: Tensor, mode: DecayMode) -> Tensor:
    """Return y exp(-d g(z)) for y and z (..., F), without in-place operations."""
    return y if mode == "none" else y * torch.exp(-decay * _envelope_argument(z, mode))


def damped_sine_formula(z: Tensor, amplitude: Tensor, frequency: Tensor, decay: Tensor, mode: DecayMode) -> Tensor:
    """Return the activation of (M, F) without in-place operations; torch.compile fuses it into one kernel."""
    # y = A sin(f z) exp(-d g(z)), in float32
    wide = z.float()
    return damp(amplitude * torch.sin(frequency * wide), wide, decay, mode).to(z.dtype)


def _gradients(
    grad: Tensor, z: Tensor, amplitude: Tensor, frequency: Tensor, decay: Tensor, mode: DecayMode
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of z, A, f and d, for z (M, F), without in-place operations.

    With G = dL/dy and e = exp(-d g(z)):
    dL/dz = G A e (f cos(f z) - d g'(z) sin(f z)),  dL/dA = sum G e sin(f z),
    dL/df = sum G A e z cos(f z),  dL/dd = -sum G A e g(z) sin(f z), each sum over the M rows.
    """
    # damped = G e, by_amplitude = G e sin(f z), by_phase = A G e cos(f z)
    wide = z.float()
    damped = grad.float()
    if mode != "none":
        damped = damped * torch.exp(-decay * _envelope_argument(wide, mode))
    phase = frequency * wide
    by_amplitude = damped * torch.sin(phase)
    by_phase = amplitude * damped * torch.cos(phase)
    if z.device.type == "cpu":
        # All four gradients read these two. Fused into the column sums, the compiler would compute sine, cosine and
        # exponential a second time; storing them is cheaper (docs/research/log.md, 2026-11-26).
        by_amplitude, by_phase = realize(by_amplitude), realize(by_phase)
    # dL/dz = f by_phase - d g'(z) A by_amplitude, and the sums for A, f and d
    grad_z = frequency * by_phase
    if mode == "none":
        grad_decay = torch.zeros_like(decay)
    else:
        slope = wide.sign() if mode == "abs" else (wide > 0).float()
        grad_z = grad_z - decay * slope * amplitude * by_amplitude
        grad_decay = -amplitude * _sum_of_rows(by_amplitude * _envelope_argument(wide, mode))
    return grad_z.to(z.dtype), _sum_of_rows(by_amplitude), _sum_of_rows(by_phase * wide), grad_decay


def _sum_of_rows(x: Tensor) -> Tensor:
    """Return the sum of (M, F) over M, on a CPU in two stages, of which the first reads whole rows."""
    n_rows, n_features = x.shape
    if x.device.type == "cpu" and n_rows % _ROWS_SUMMED == 0:
        x = x.view(-1, _ROWS_SUMMED, n_features).sum(1)
    return x.sum(0)


@lru_cache(maxsize=1)
def _compiled() -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]]:
    return compiled(damped_sine_formula, dynamic=True), compiled(_gradients, dynamic=True)


def _runs_in_blocks(z: Tensor) -> bool:
    # Fake tensors (models/accounting.py) allocate nothing, and the widest models would take thousands of blocks.
    return not z.is_cuda and not isinstance(z, FakeTensor)


def _blocks(n_rows: int, n_features: int) -> range:
    # Whole rows, about _BLOCK_ELEMENTS elements for each thread among which torch splits an operation.
    return range(0, n_rows, max(1, _BLOCK_ELEMENTS * torch.get_num_threads() // n_features))


def _value_in_blocks(z: Tensor, amplitude: Tensor, frequency: Tensor, decay: Tensor, mode: DecayMode) -> Tensor:
    """Return ``damped_sine_formula`` on a CPU, in blocks whose intermediates stay in cache."""
    return gated_value(z, None, amplitude, frequency, decay, mode)


def gated_value(
    z: Tensor, up: Tensor | None, amplitude: Tensor, frequency: Tensor, decay: Tensor, mode: DecayMode
) -> Tensor:
    """Return the activation of (M, F) on a CPU, times ``up`` (M, F) where there is one, in z's dtype."""
    n_rows, n_features = z.shape
    blocks = _blocks(n_rows, n_features)
    out = torch.empty_like(z)
    if not _runs_in_blocks(z):
        return out  # only its shape is used
    is_narrow = z.dtype != torch.float32
    # Float32 buffers of one block: z, the product so far, exp(-d g(z)), and `up`. The first and the last are used for
    # bfloat16 alone, which is widened block by block instead of as a whole.
    buffers = torch.empty(4, min(blocks.step, n_rows), n_features)
    negative_decay = -decay
    for start in blocks:
        block, result = z[start : start + blocks.step], out[start : start + blocks.step]
        wide, sine, envelope, factor = buffers[:, : len(block)]
        if is_narrow:
            block = wide.copy_(block)
        # sine = A sin(f z)
        torch.mul(block, frequency, out=sine).sin_().mul_(amplitude)
        if up is not None:
            by = up[start : start + blocks.step]
            sine.mul_(factor.copy_(by) if is_narrow else by)
        if mode != "none":
            # sine = A sin(f z) up exp(-d g(z)): the result, in float32
            sine.mul_(_envelope_into(envelope, block, negative_decay, mode))
        result.copy_(sine)
    return out


def _envelope_into(envelope: Tensor, z: Tensor, negative_decay: Tensor, mode: DecayMode) -> Tensor:
    """Write exp(-d g(z)) into ``envelope`` and return it."""
    torch.abs(z, out=envelope) if mode == "abs" else torch.clamp(z, min=0.0, out=envelope)
    return envelope.mul_(negative_decay).exp_()


def _gradients_in_blocks(
    grad: Tensor, z: Tensor, amplitude: Tensor, frequency: Tensor, decay: Tensor, mode: DecayMode
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``_gradients`` on a CPU, in blocks whose intermediates stay in cache."""
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
    """Replace ``grad``, the gradient of the result of :func:`gated_value`, by that of z, in one pass over memory.

    With h = y up, G = dL/dh, e = exp(-d g(z)), s = e sin(f z) and c = e cos(f z):
    dL/dup = G A s,  dL/dy = G up,  dL/dz = dL/dy (A f c - d A g'(z) s),
    dL/dA = sum dL/dy s,  dL/df = A sum dL/dy z c,  dL/dd = -A sum dL/dy g(z) s, each sum over the M rows.

    Returns:
        The result of :func:`gated_value` (None unless ``wants_value``), the gradient of ``up`` (None without one), and
        the gradients (F,) of amplitude, frequency and decay.
    """
    n_rows, n_features = z.shape
    blocks = _blocks(n_rows, n_features)
    value = torch.empty_like(z) if wants_value else None
    grad_up = None if up is None else torch.empty_like(up)
    sums = torch.zeros(3, n_features)
    is_narrow = z.dtype != torch.float32
    # Float32 buffers of one block; those of z, up and grad are used for bfloat16 alone.
    buffers = torch.empty(7, min(blocks.step, n_rows), n_features)
    negative_decay, slope, fall = -decay, amplitude * frequency, decay * amplitude  # -d, A f, d A
    for start in blocks:
        rows = slice(start, start + blocks.step)
        block, into = z[rows], grad[rows]
        wide, damped, by_sine, by_cosine, scratch, wide_up, wide_grad = buffers[:, : len(block)]
        gradient = into
        if is_narrow:
            block, gradient = wide.copy_(block), wide_grad.copy_(gradient)
        # by_sine = s, by_cosine = c
        torch.mul(block, frequency, out=by_cosine)
        torch.sin(by_cosine, out=by_sine)
        by_cosine.cos_()
        if mode != "none":
            _envelope_into(damped, block, negative_decay, mode)
            by_sine.mul_(damped)
            by_cosine.mul_(damped)
        factor: Tensor | None = None
        if up is not None and grad_up is not None:
            factor = wide_up.copy_(up[rows]) if is_narrow else up[rows]
        # scratch = A s = y;  dL/dup = G y,  h = y up. From here on `damped` is free for narrow results.
        if value is not None or grad_up is not None:
            torch.mul(by_sine, amplitude, out=scratch)
            if grad_up is not None:
                _write_product(grad_up[rows], scratch, gradient, damped)
            if value is not None:
                value[rows].copy_(scratch) if factor is None else _write_product(value[rows], scratch, factor, damped)
        # gradient = dL/dy = G up
        if factor is not None:
            gradient = torch.mul(gradient, factor, out=damped)
        # by_sine = dL/dy s, by_cosine = dL/dy c; the sums of A and f over the rows of this block
        by_sine.mul_(gradient)
        by_cosine.mul_(gradient)
        sums[0] += by_sine.sum(0)
        sums[1] += torch.mul(by_cosine, block, out=scratch).sum(0)
        # by_cosine = dL/dy A f c: the first term of dL/dz, all of it without a decay
        by_cosine.mul_(slope)
        if mode != "none":
            # sum of -dL/dy g(z) s
            torch.abs(block, out=scratch) if mode == "abs" else torch.clamp(block, min=0.0, out=scratch)
            sums[2] -= scratch.mul_(by_sine).sum(0)
            # by_cosine -= dL/dy d A g'(z) s
            torch.sign(block, out=scratch) if mode == "abs" else torch.gt(block, 0.0, out=scratch)
            by_cosine.addcmul_(by_sine.mul_(fall), scratch, value=-1)
        into.copy_(by_cosine)
    return value, grad_up, (sums[0], sums[1].mul_(amplitude), sums[2].mul_(amplitude))


def _write_product(into: Tensor, left: Tensor, right: Tensor, scratch: Tensor) -> None:
    """Write the product of two float32 tensors into one that may be bfloat16."""
    # `out=` needs the dtype of the result, so that a narrow one is rounded from a float32 buffer.
    if into.dtype == torch.float32:
        torch.mul(left, right, out=into)
    else:
        into.copy_(torch.mul(left, right, out=scratch))


class _DampedSine(torch.autograd.Function):
    """The activation on (M, F) with float32 parameters (F,); saves only z, in its own dtype."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, amplitude: Tensor, frequency: Tensor, decay: Tensor, mode: DecayMode) -> Tensor:
        # Only z has the size of the activations.
        ctx.save_for_backward(z, amplitude, frequency, decay)
        ctx.mode = mode
        # A compiled model fuses the formula with its neighbours; an uncompiled one on a GPU gets one fused kernel.
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
        z: (..., F), any floating dtype; computed in float32, whatever the dtype of z or an autocast region.
        amplitude, frequency, decay: (F,), float32. Frequency is in radians per unit of z.

    Returns:
        (..., F) in z's dtype. Differentiable once in all four tensors; the derivative of ``|z|`` at 0 is taken as 0.
    """
    flat = z.reshape(-1, z.shape[-1])
    y: Tensor = _DampedSine.apply(flat, amplitude, frequency, decay, mode)  # type: ignore[no-untyped-call]
    return y.view(z.shape)

"""The PSANN activation y = A exp(-d g(z)) sin(f z): one pass over memory each way, saving only z for the backward.

Sine networks train only when the argument of the sine has about unit variance (Sitzmann et al. 2020, arXiv 2006.09661);
here that is met by unit-variance pre-activations and f = 1 instead of their w0 = 30, and a damping is added.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from psannlm.config.model import SineConfig

DecayMode = Literal["abs", "relu", "none"]

# Elements worked on at a time on a CPU, per thread: three float32 buffers of this size stay in the second-level cache.
_BLOCK_ELEMENTS = 65_536


def inverse_softplus(value: Tensor) -> Tensor:
    """Return x such that softplus(x) = ``value``, for positive ``value`` of any shape."""
    return value + torch.log(-torch.expm1(-value))


def _envelope_argument(z: Tensor, mode: DecayMode) -> Tensor:
    return z.abs() if mode == "abs" else z.clamp(min=0.0)


def _value(z: Tensor, amplitude: Tensor, frequency: Tensor, decay: Tensor, mode: DecayMode) -> Tensor:
    """The activation as plain tensor algebra on (N, F); what torch.compile fuses into one kernel."""
    wide = z.float()
    y = amplitude * torch.sin(frequency * wide)
    if mode != "none":
        y = y * torch.exp(-decay * _envelope_argument(wide, mode))
    return y.to(z.dtype)


def _gradients(
    grad: Tensor, z: Tensor, amplitude: Tensor, frequency: Tensor, decay: Tensor, mode: DecayMode
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to z, A, f and d, as plain tensor algebra on (N, F)."""
    wide = z.float()
    damped = grad.float()
    if mode != "none":
        damped = damped * torch.exp(-decay * _envelope_argument(wide, mode))
    phase = frequency * wide
    by_amplitude = damped * torch.sin(phase)
    by_phase = amplitude * damped * torch.cos(phase)
    grad_z = frequency * by_phase
    if mode == "none":
        grad_decay = torch.zeros_like(decay)
    else:
        slope = wide.sign() if mode == "abs" else (wide > 0).float()
        grad_z = grad_z - decay * slope * amplitude * by_amplitude
        grad_decay = -amplitude * (by_amplitude * _envelope_argument(wide, mode)).sum(0)
    return grad_z.to(z.dtype), by_amplitude.sum(0), (by_phase * wide).sum(0), grad_decay


@lru_cache(maxsize=1)
def _compiled() -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]]:
    return torch.compile(_value, dynamic=True), torch.compile(_gradients, dynamic=True)


def _fuses_by_compiler(z: Tensor) -> bool:
    return z.is_cuda and find_spec("triton") is not None


def _runs_in_blocks(z: Tensor) -> bool:
    # Where shapes alone are worked out (models/accounting.py) there is no memory to be gentle with, and in the widest
    # models there would be thousands of blocks.
    return not z.is_cuda and not isinstance(z, FakeTensor)


def _blocks(n_rows: int, n_features: int) -> range:
    return range(0, n_rows, max(1, _BLOCK_ELEMENTS * torch.get_num_threads() // n_features))


def _value_in_blocks(z: Tensor, amplitude: Tensor, frequency: Tensor, decay: Tensor, mode: DecayMode) -> Tensor:
    """``_value`` for a CPU: every intermediate lives in a buffer that stays in cache."""
    n_rows, n_features = z.shape
    blocks = _blocks(n_rows, n_features)
    out = torch.empty_like(z)
    wave_buffer, envelope_buffer = torch.empty(2, min(blocks.step, n_rows), n_features)
    for start in blocks:
        block = z[start : start + blocks.step]
        wave, envelope = wave_buffer[: len(block)], envelope_buffer[: len(block)]
        wave.copy_(block)
        if mode != "none":
            torch.abs(wave, out=envelope) if mode == "abs" else torch.clamp(wave, min=0.0, out=envelope)
            envelope.mul_(decay).neg_().exp_()
        wave.mul_(frequency).sin_().mul_(amplitude)
        if mode != "none":
            wave.mul_(envelope)
        out[start : start + blocks.step].copy_(wave)
    return out


def _gradients_in_blocks(
    grad: Tensor, z: Tensor, amplitude: Tensor, frequency: Tensor, decay: Tensor, mode: DecayMode
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``_gradients`` for a CPU: every intermediate lives in a buffer that stays in cache."""
    n_rows, n_features = z.shape
    blocks = _blocks(n_rows, n_features)
    grad_z = torch.empty_like(z)
    grad_amplitude, grad_frequency, grad_decay = torch.zeros(3, n_features)
    buffers = torch.empty(5, min(blocks.step, n_rows), n_features)
    decay_by_amplitude = decay * amplitude
    for start in blocks:
        block = z[start : start + blocks.step]
        wide, argument, damped, by_amplitude, by_phase = buffers[:, : len(block)]
        wide.copy_(block)
        damped.copy_(grad[start : start + blocks.step])
        if mode != "none":
            torch.abs(wide, out=argument) if mode == "abs" else torch.clamp(wide, min=0.0, out=argument)
            torch.mul(argument, decay, out=by_phase).neg_().exp_()
            damped.mul_(by_phase)
        torch.mul(wide, frequency, out=by_phase)
        torch.sin(by_phase, out=by_amplitude).mul_(damped)
        by_phase.cos_().mul_(damped).mul_(amplitude)
        grad_amplitude += by_amplitude.sum(0)
        torch.mul(by_phase, wide, out=damped)
        grad_frequency += damped.sum(0)
        by_phase.mul_(frequency)
        if mode != "none":
            torch.mul(by_amplitude, argument, out=damped)
            grad_decay -= damped.sum(0)
            wide.sign_() if mode == "abs" else wide.gt_(0.0)
            by_phase.sub_(by_amplitude.mul_(decay_by_amplitude).mul_(wide))
        grad_z[start : start + blocks.step].copy_(by_phase)
    return grad_z, grad_amplitude, grad_frequency, grad_decay.mul_(amplitude)


class _DampedSine(torch.autograd.Function):
    """The activation on (N, F) with float32 parameters (F,); saves z in its own dtype and nothing else of its size."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, amplitude: Tensor, frequency: Tensor, decay: Tensor, mode: DecayMode) -> Tensor:
        ctx.save_for_backward(z, amplitude, frequency, decay)
        ctx.mode = mode
        if torch.compiler.is_compiling():
            return _value(z, amplitude, frequency, decay, mode)
        if _fuses_by_compiler(z):
            return _compiled()[0](z, amplitude, frequency, decay, mode)
        kernel = _value_in_blocks if _runs_in_blocks(z) else _value
        return kernel(z, amplitude, frequency, decay, mode)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        z, amplitude, frequency, decay = ctx.saved_tensors
        if torch.compiler.is_compiling():
            kernel = _gradients
        elif _fuses_by_compiler(z):
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


class SineActivation(nn.Module):
    """Damped sine with an amplitude, frequency and decay per feature, each positive: softplus of a raw parameter.

    Args:
        n_features: size F of the last dimension.
        config: initial values, spread, bounds, and which of the three learn; the others are buffers.
    """

    def __init__(self, n_features: int, config: SineConfig) -> None:
        super().__init__()
        self.mode: DecayMode = config.decay_mode
        self.bounds = {"amplitude": config.amp_bounds, "frequency": config.freq_bounds, "decay": config.damp_bounds}
        starts = {
            "amplitude": (config.amp_init, config.amp_std),
            "frequency": (config.freq_init, config.freq_std),
            "decay": (config.damp_init, config.damp_std),
        }
        learnable = config.learnable_parameters()
        self._frozen: dict[str, Tensor] = {}
        for name, (mean, spread) in starts.items():
            value = torch.full((n_features,), mean)
            if spread:
                # Kept positive, where the raw parameter exists; a spread that reaches zero is cut off near it.
                value = (value + spread * torch.randn(n_features)).clamp(min=mean / 1000)
            raw = inverse_softplus(value.double()).float()
            if name in learnable:
                self.register_parameter(f"raw_{name}", nn.Parameter(raw))
            else:
                self.register_buffer(f"raw_{name}", raw)

    def value_of(self, name: str) -> Tensor:
        """Return the (F,) float32 values of ``amplitude``, ``frequency`` or ``decay``, within their bounds."""
        if name in self._frozen:
            return self._frozen[name]
        value = F.softplus(getattr(self, f"raw_{name}").float())
        bounds = self.bounds[name]
        return value if bounds is None else value.clamp(*bounds)

    def freeze(self) -> None:
        """Work the parameters out once, for inference: from now on neither training nor loading changes them."""
        self._frozen = {name: self.value_of(name).detach() for name in ("amplitude", "frequency", "decay")}

    def forward(self, z: Tensor) -> Tensor:
        """Map (..., F) to (..., F), same dtype."""
        if self._frozen:
            frozen = self._frozen
            return _value(z, frozen["amplitude"], frozen["frequency"], frozen["decay"], self.mode)
        with torch.autocast(z.device.type, enabled=False):
            amplitude, frequency, decay = map(self.value_of, ("amplitude", "frequency", "decay"))
            return damped_sine(z, amplitude, frequency, decay, self.mode)

    def extra_repr(self) -> str:
        return f"n_features={len(self.value_of('amplitude'))}, decay_mode={self.mode}"

"""Activation modules: damped sine with learnable amplitude, frequency and decay, and squared ReLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psannlm.config.model import SineConfig
from psannlm.kernels.damped_sine import DecayMode, damped_sine, damped_sine_formula


def inverse_softplus(value: Tensor) -> Tensor:
    """Return x such that softplus(x) = ``value``, for positive ``value`` of any shape."""
    return value + torch.log(-torch.expm1(-value))


def is_activation_parameter(name: str) -> bool:
    """Whether the parameter or buffer ``name`` is one of an activation: kept in float32, in files of 16 bits too."""
    return name.rpartition(".")[2].startswith("raw_")


class SineActivation(nn.Module):
    """Damped sine with an amplitude, frequency and decay per feature, each positive: softplus of a raw parameter.

    Args:
        n_features: size F of the last dimension.
        config: initial values, spread, bounds, and which of the three are learnable; the others are buffers.
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
            if spread and not value.is_meta:
                # The raw parameter exists for positive values only; values below mean / 1000 are clamped.
                value = (value + spread * torch.randn(n_features)).clamp(min=mean / 1000)
            raw = value if value.is_meta else inverse_softplus(value.double()).float()
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

    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return amplitude, frequency and decay as :meth:`value_of` does, whatever the autocast."""
        raw: Tensor = getattr(self, "raw_amplitude")  # noqa: B009
        with torch.autocast(raw.device.type, enabled=False):
            return self.value_of("amplitude"), self.value_of("frequency"), self.value_of("decay")

    @property
    def is_frozen(self) -> bool:
        """Whether :meth:`freeze` was called."""
        return bool(self._frozen)

    def freeze(self) -> None:
        """Compute the parameters once, for inference; training and loading do not change them afterwards."""
        self._frozen = {name: self.value_of(name).detach() for name in ("amplitude", "frequency", "decay")}

    def forward(self, z: Tensor) -> Tensor:
        """Map (..., F) to (..., F), same dtype."""
        if self._frozen:
            frozen = self._frozen
            return damped_sine_formula(z, frozen["amplitude"], frozen["frequency"], frozen["decay"], self.mode)
        with torch.autocast(z.device.type, enabled=False):
            return damped_sine(z, *self.values(), self.mode)

    def extra_repr(self) -> str:
        return f"n_features={len(self.value_of('amplitude'))}, decay_mode={self.mode}"


class SquaredReLU(nn.Module):
    """max(z, 0) squared (So et al. 2021, arXiv 2109.08668)."""

    def forward(self, z: Tensor) -> Tensor:
        """Map a tensor of any shape to one of the same shape."""
        return F.relu(z).square()

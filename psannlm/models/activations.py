"""Activation modules: the damped sine with learnable amplitude, frequency and decay, its variants, and squared ReLU.

Letters as in ``psannlm.models``. Only ``SineActivation`` has hand-written kernels; the variants are plain formulas,
which a compiler fuses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psannlm.config.model import SineConfig, SineParameter
from psannlm.kernels.damped_sine import DecayMode, damp, damped_sine, damped_sine_formula

# Start of the learned weight of the sine that is added to a GELU: small, so that training starts as that of a GELU.
ADDED_SINE_WEIGHT = 0.1
# Parameters of activations that are used as they are stored. All others are softplus of a raw parameter.
_SIGNED_PARAMETERS = frozenset(("sine_weight", "phase"))


def inverse_softplus(value: Tensor) -> Tensor:
    """Return x such that softplus(x) = ``value``, for positive ``value`` of any shape."""
    return value + torch.log(-torch.expm1(-value))


def is_activation_parameter(name: str) -> bool:
    """Whether the parameter or buffer ``name`` is one of an activation: kept in float32, in files of 16 bits too."""
    leaf = name.rpartition(".")[2]
    return leaf.startswith("raw_") or leaf in _SIGNED_PARAMETERS


class ParametricActivation(nn.Module):
    """Activation with float32 parameters per feature: positive ones (softplus of a raw parameter) and signed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.bounds: dict[str, tuple[float, float] | None] = {}
        self._frozen: dict[str, Tensor] = {}

    def _add_positive(
        self,
        name: str,
        n_features: int,
        start: tuple[float, float],
        bounds: tuple[float, float] | None,
        *,
        is_learnable: bool,
    ) -> None:
        """Register ``raw_<name>``, a parameter or else a buffer, from ``start``: mean and standard deviation."""
        mean, spread = start
        self.bounds[name] = bounds
        value = torch.full((n_features,), mean)
        if spread and not value.is_meta:
            # The raw parameter exists for positive values only; values below mean / 1000 are clamped.
            value = (value + spread * torch.randn(n_features)).clamp(min=mean / 1000)
        self._add(f"raw_{name}", value if value.is_meta else inverse_softplus(value.double()).float(), is_learnable)

    def _add_signed(self, name: str, n_features: int, start: float, *, is_learnable: bool = True) -> None:
        """Register ``name``, a parameter or else a buffer that is used as it is, from ``start``."""
        self.bounds[name] = None
        self._add(name, torch.full((n_features,), start), is_learnable)

    def _add(self, name: str, value: Tensor, is_learnable: bool) -> None:
        if is_learnable:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def value_of(self, name: str) -> Tensor:
        """Return the (F,) float32 values of a parameter, such as ``amplitude``, within its bounds."""
        if name in self._frozen:
            return self._frozen[name]
        if name in _SIGNED_PARAMETERS:
            signed: Tensor = getattr(self, name)
            return signed.float()
        value = F.softplus(getattr(self, f"raw_{name}").float())
        bounds = self.bounds[name]
        return value if bounds is None else value.clamp(*bounds)

    @property
    def is_frozen(self) -> bool:
        """Whether :meth:`freeze` was called."""
        return bool(self._frozen)

    def freeze(self) -> None:
        """Compute the parameters once, for inference; training and loading do not change them afterwards."""
        self._frozen = {name: self.value_of(name).detach().clone() for name in self.bounds}


class SineActivation(ParametricActivation):
    """Damped sine with an amplitude, frequency and decay per feature, each positive: softplus of a raw parameter.

    Args:
        n_features: size F of the last dimension.
        config: initial values, spread, bounds, and which of the three are learnable; the others are buffers.
        n_amplitudes: number of amplitudes; None: F.
    """

    def __init__(self, n_features: int, config: SineConfig, n_amplitudes: int | None = None) -> None:
        super().__init__()
        self.mode: DecayMode = config.decay_mode
        learnable = config.learnable_parameters()
        starts: dict[SineParameter, tuple[tuple[float, float], tuple[float, float] | None]] = {
            "amplitude": ((config.amp_init, config.amp_std), config.amp_bounds),
            "frequency": ((config.freq_init, config.freq_std), config.freq_bounds),
            "decay": ((config.damp_init, config.damp_std), config.damp_bounds),
        }
        for name, (start, bounds) in starts.items():
            size = n_amplitudes if name == "amplitude" and n_amplitudes is not None else n_features
            self._add_positive(name, size, start, bounds, is_learnable=name in learnable)

    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return amplitude, frequency and decay as :meth:`value_of` does, whatever the autocast."""
        raw: Tensor = getattr(self, "raw_amplitude")  # noqa: B009
        with torch.autocast(raw.device.type, enabled=False):
            return self.value_of("amplitude"), self.value_of("frequency"), self.value_of("decay")

    def forward(self, z: Tensor) -> Tensor:
        """Map (..., F) to (..., F), same dtype."""
        if self._frozen:
            frozen = self._frozen
            return damped_sine_formula(z, frozen["amplitude"], frozen["frequency"], frozen["decay"], self.mode)
        with torch.autocast(z.device.type, enabled=False):
            return damped_sine(z, *self.values(), self.mode)

    def extra_repr(self) -> str:
        return f"n_features={len(self.value_of('amplitude'))}, decay_mode={self.mode}"


class PhasedSine(SineActivation):
    """A exp(-d g(z)) (sin(f z + p) - sin p) with a learned phase p per feature, so that it is 0 at z = 0.

    Args:
        phase: initial p in radians; None: no phase.
    """

    def __init__(self, n_features: int, config: SineConfig, phase: float | None) -> None:
        super().__init__(n_features, config)
        self.has_phase = phase is not None
        if phase is not None:
            self._add_signed("phase", n_features, phase)

    def _sine(self, angle: Tensor) -> Tensor:
        return torch.sin(angle)

    def forward(self, z: Tensor) -> Tensor:
        """Map (..., F) to (..., F), same dtype; computed in float32."""
        with torch.autocast(z.device.type, enabled=False):
            amplitude, frequency, decay = self.values()
            wide = z.float()
            if self.has_phase:
                phase = self.value_of("phase")
                y = self._sine(frequency * wide + phase) - self._sine(phase)
            else:
                y = self._sine(frequency * wide)
            return damp(amplitude * y, wide, decay, self.mode).to(z.dtype)


class ClampedSine(PhasedSine):
    """The same with the sine's angle clamped to ±π/2: as bounded as the sine, without its period.

    With the decay mode ``none`` it is monotone. Parameters have the names of ``SineActivation``, so that the weights of
    a model with one can be loaded into a model with the other.
    """

    def _sine(self, angle: Tensor) -> Tensor:
        return torch.sin(angle.clamp(-math.pi / 2, math.pi / 2))


class QuadratureSine(SineActivation):
    """A exp(-d g(z)) sin(f z), followed by A exp(-d g(z)) cos(f z): two features from each row of the matrix before.

    Frequency and decay belong to a row, amplitudes to a feature.

    Args:
        n_features: F, sines and cosines together. For an odd F the last row has no cosine.
    """

    def __init__(self, n_features: int, config: SineConfig) -> None:
        super().__init__(n_rows_of_pairs(n_features), config, n_amplitudes=n_features)
        self.n_cosines = n_features // 2

    def forward(self, z: Tensor) -> Tensor:
        """Map the (..., R) rows, R = ceil(F / 2), to (..., F), same dtype; computed in float32."""
        with torch.autocast(z.device.type, enabled=False):
            amplitude, frequency, decay = self.values()
            wide = z.float()
            angle = frequency * wide
            sines, cosines = (damp(y, wide, decay, self.mode) for y in (torch.sin(angle), torch.cos(angle)))
            return (amplitude * torch.cat((sines, cosines[..., : self.n_cosines]), dim=-1)).to(z.dtype)


def n_rows_of_pairs(n_features: int) -> int:
    """Return the rows that give ``n_features`` where each row gives a sine and a cosine."""
    return (n_features + 1) // 2


class GeluSine(ParametricActivation):
    """GELU(z) + a sin(f z) with a signed weight a and a positive frequency f per feature (arXiv 2602.05688).

    GELU is the case a = 0. The weight starts at ``ADDED_SINE_WEIGHT``; the frequency as that of ``SineActivation``.
    ``config.learnable`` names the weight ``amplitude``; amplitude and decay settings have no effect. With a ``phase``,
    the initial p in radians, it is GELU(z) + a (sin(f z + p) - sin p).
    """

    def __init__(self, n_features: int, config: SineConfig, phase: float | None) -> None:
        super().__init__()
        learnable = config.learnable_parameters()
        self._add_signed("sine_weight", n_features, ADDED_SINE_WEIGHT, is_learnable="amplitude" in learnable)
        start = (config.freq_init, config.freq_std)
        self._add_positive("frequency", n_features, start, config.freq_bounds, is_learnable="frequency" in learnable)
        self.has_phase = phase is not None
        if phase is not None:
            self._add_signed("phase", n_features, phase)

    def forward(self, z: Tensor) -> Tensor:
        """Map (..., F) to (..., F), same dtype; computed in float32."""
        with torch.autocast(z.device.type, enabled=False):
            wide = z.float()
            angle = self.value_of("frequency") * wide
            if self.has_phase:
                phase = self.value_of("phase")
                sine = torch.sin(angle + phase) - torch.sin(phase)
            else:
                sine = torch.sin(angle)
            return (F.gelu(wide) + self.value_of("sine_weight") * sine).to(z.dtype)


class GainedActivation(ParametricActivation):
    """c · act(b z) with positive gains b of the input and c of the output per feature, both 1 at the start.

    With it any activation has the freedom that amplitude and frequency give the sine.

    Args:
        activation: from ``n_inputs`` (None: the same number) to ``n_features``.
    """

    def __init__(self, activation: nn.Module, n_features: int, n_inputs: int | None = None) -> None:
        super().__init__()
        self._add_positive("input_gain", n_inputs or n_features, (1.0, 0.0), None, is_learnable=True)
        self._add_positive("output_gain", n_features, (1.0, 0.0), None, is_learnable=True)
        self.activation = activation

    def forward(self, z: Tensor) -> Tensor:
        """Map the (..., inputs) to (..., F), same dtype; computed in float32."""
        with torch.autocast(z.device.type, enabled=False):
            y: Tensor = self.activation(z.float() * self.value_of("input_gain"))
            return (y * self.value_of("output_gain")).to(z.dtype)


class SquaredReLU(nn.Module):
    """max(z, 0) squared (So et al. 2021, arXiv 2109.08668)."""

    def forward(self, z: Tensor) -> Tensor:
        """Map a tensor of any shape to one of the same shape."""
        return F.relu(z).square()


class SineSquaredReLU(nn.Module):
    """The damped sine on the first F // 2 features, with a phase where one is given; squared ReLU on the others."""

    def __init__(self, n_features: int, config: SineConfig, phase: float | None) -> None:
        super().__init__()
        self.n_sines = n_features // 2
        self.sine: nn.Module = SineActivation(self.n_sines, config)
        if phase is not None:
            self.sine = PhasedSine(self.n_sines, config, phase)

    def forward(self, z: Tensor) -> Tensor:
        """Map (..., F) to (..., F), same dtype."""
        sines, others = self.sine(z[..., : self.n_sines]), F.relu(z[..., self.n_sines :]).square()
        return torch.cat((sines, others), dim=-1)

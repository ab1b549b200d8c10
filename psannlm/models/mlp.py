"""Feed-forward layers, plain and gated, and their activations. Letters as in ``psannlm.models``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from psannlm.config.model import MlpKind, ModelConfig
from psannlm.kernels.onednn import Linear
from psannlm.kernels.recompute import fused_act_down_proj, fused_sine_down_proj, use_recompute
from psannlm.models.activations import (
    ClampedSine,
    GainedActivation,
    GeluSine,
    PhasedSine,
    QuadratureSine,
    SineActivation,
    SineSquaredReLU,
    SquaredReLU,
    n_rows_of_pairs,
)


def _sine(config: ModelConfig, n_features: int) -> nn.Module:
    if config.sine_quadrature:
        return QuadratureSine(n_features, config.sine_params)
    if config.sine_phase is not None:
        return PhasedSine(n_features, config.sine_params, config.sine_phase)
    return SineActivation(n_features, config.sine_params)


# Name of an activation -> its builder, from the configuration and the number of features.
ACTIVATIONS: dict[str, Callable[[ModelConfig, int], nn.Module]] = {
    "sine": _sine,
    "clampedsine": lambda config, n_features: ClampedSine(n_features, config.sine_params, config.sine_phase),
    "gelusine": lambda config, n_features: GeluSine(n_features, config.sine_params, config.sine_phase),
    "sinerelu2": lambda config, n_features: SineSquaredReLU(n_features, config.sine_params, config.sine_phase),
    "gelu": lambda config, n_features: nn.GELU(),
    "silu": lambda config, n_features: nn.SiLU(),
    "relu2": lambda config, n_features: SquaredReLU(),
    "tanh": lambda config, n_features: nn.Tanh(),
    "sigmoid": lambda config, n_features: nn.Sigmoid(),
}


@dataclass(frozen=True)
class FeedForwardKind:
    """A kind of feed-forward: its activation, whether that is a gate, and whether its input has a bias."""

    activation: str
    is_gated: bool = False
    has_bias: bool = False


# Every kind of feed-forward. The bias is the phase of an ungated sine.
KINDS: dict[MlpKind, FeedForwardKind] = {
    "sine": FeedForwardKind("sine", has_bias=True),
    "sineglu": FeedForwardKind("sine", is_gated=True),
    "gelu": FeedForwardKind("gelu"),
    "geglu": FeedForwardKind("gelu", is_gated=True),
    "swiglu": FeedForwardKind("silu", is_gated=True),
    "relu2": FeedForwardKind("relu2"),
    "silu": FeedForwardKind("silu"),
    "tanh": FeedForwardKind("tanh"),
    "tanhglu": FeedForwardKind("tanh", is_gated=True),
    "sigmoid": FeedForwardKind("sigmoid"),
    "sigmoidglu": FeedForwardKind("sigmoid", is_gated=True),
    "clampedsine": FeedForwardKind("clampedsine", has_bias=True),
    "clampedsineglu": FeedForwardKind("clampedsine", is_gated=True),
    "gelusine": FeedForwardKind("gelusine"),
    "sinerelu2": FeedForwardKind("sinerelu2"),
}
GATED_KINDS = frozenset(name for name, kind in KINDS.items() if kind.is_gated)


def default_d_mlp(kind: MlpKind, d_model: int, *, is_quadrature: bool = False) -> int:
    """Return F: 4 D, for the gated kinds 8/3 D rounded up to a multiple of 64, so that parameters are about equal.

    With ``is_quadrature``, where the matrix before the activation has half as many rows, 16/3 D and 16/5 D instead,
    both rounded to a multiple of 32.
    """
    if is_quadrature:
        return 32 * max(1, round(d_model / (10 if kind in GATED_KINDS else 6)))
    return -(-8 * d_model // (3 * 64)) * 64 if kind in GATED_KINDS else 4 * d_model


def _kind(config: ModelConfig) -> FeedForwardKind:
    assert config.mlp is not None
    return KINDS[config.mlp]


def _n_activation_inputs(config: ModelConfig, d_mlp: int) -> int:
    return n_rows_of_pairs(d_mlp) if config.sine_quadrature else d_mlp


def _activation(config: ModelConfig, n_features: int) -> nn.Module:
    activation = ACTIVATIONS[_kind(config).activation](config, n_features)
    if config.activation_gains:
        return GainedActivation(activation, n_features, _n_activation_inputs(config, n_features))
    return activation


def _activation_norm(config: ModelConfig, d_mlp: int) -> nn.RMSNorm | None:
    # Without weights: a gain per feature is a key of its own, and the sine has one.
    if not config.activation_norm:
        return None
    return nn.RMSNorm(_n_activation_inputs(config, d_mlp), eps=config.norm_eps, elementwise_affine=False)


def _normed(norm: nn.RMSNorm | None, z: Tensor) -> Tensor:
    """Return the norm of z, whose mean squares are in float32 where the projections are bfloat16."""
    if norm is None:
        return z
    y: Tensor = norm(z.float())
    return y.to(z.dtype)


def _project_down(activation: nn.Module, z: Tensor, up: Tensor | None, down: nn.Module) -> Tensor:
    """Return ``down(activation(z) * up)``; training on a CPU recomputes the activation in the backward pass."""
    if use_recompute(z) and type(down) is Linear:
        if type(activation) is SineActivation and not activation.is_frozen:
            return fused_sine_down_proj(z, up, down.weight, activation.values(), activation.mode)
        if type(activation) in (nn.GELU, nn.SiLU):
            return fused_act_down_proj(z, up, down.weight, is_gelu=type(activation) is nn.GELU)
    hidden = activation(z)
    out: Tensor = down(hidden if up is None else hidden * up)
    return out


class Mlp(nn.Module):
    """``down(act(up(x)))`` with an activation of ``ACTIVATIONS``."""

    def __init__(self, config: ModelConfig, d_mlp: int) -> None:
        super().__init__()
        n_inputs = _n_activation_inputs(config, d_mlp)
        self.up_proj: nn.Module = Linear(config.d_model, n_inputs, bias=_kind(config).has_bias)
        self.activation_norm = _activation_norm(config, d_mlp)
        self.activation = _activation(config, d_mlp)
        self.down_proj: nn.Module = Linear(d_mlp, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return _project_down(self.activation, _normed(self.activation_norm, self.up_proj(x)), None, self.down_proj)

    @property
    def activation_proj(self) -> nn.Module:
        """The matrix whose result is the input of the activation."""
        return self.up_proj


class GatedMlp(nn.Module):
    """``down(act(gate(x)) * up(x))`` (Shazeer 2020, arXiv 2002.05202) with an activation of ``ACTIVATIONS``."""

    def __init__(self, config: ModelConfig, d_mlp: int) -> None:
        super().__init__()
        self.sizes = (_n_activation_inputs(config, d_mlp), d_mlp)
        self.gate_proj = Linear(config.d_model, self.sizes[0], bias=False)
        self.up_proj = Linear(config.d_model, d_mlp, bias=False)
        self.activation_norm = _activation_norm(config, d_mlp)
        self.activation = _activation(config, d_mlp)
        self.down_proj: nn.Module = Linear(d_mlp, config.d_model, bias=False)
        # Both projections as one, in a model prepared for inference.
        self.gate_up_proj: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = self.gate_up_proj(x).split(self.sizes, dim=-1)
        return _project_down(self.activation, _normed(self.activation_norm, gate), up, self.down_proj)

    @property
    def activation_proj(self) -> nn.Module:
        """The matrix whose result is the input of the activation."""
        return self.gate_proj


def build_mlp(config: ModelConfig) -> Mlp | GatedMlp:
    """Build the feed-forward that a resolved ``config`` asks for."""
    if config.mlp is None or config.d_mlp is None:
        raise ValueError("the configuration is not resolved: call models.registry.resolve first")
    return (GatedMlp if config.mlp in GATED_KINDS else Mlp)(config, config.d_mlp)

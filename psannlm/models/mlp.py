"""Feed-forward layers, plain and gated, and their activations. Letters as in ``psannlm.models``."""

from __future__ import annotations

from torch import Tensor, nn

from psannlm.config.model import MlpKind, ModelConfig
from psannlm.kernels.onednn import Linear
from psannlm.kernels.recompute import fused_act_down_proj, fused_sine_down_proj, use_recompute
from psannlm.models.activations import SineActivation, SquaredReLU

GATED_KINDS: frozenset[MlpKind] = frozenset(("sineglu", "geglu", "swiglu"))


def default_d_mlp(kind: MlpKind, d_model: int) -> int:
    """Return F: 4 D, for the gated kinds 8/3 D rounded up to a multiple of 64, so that parameters are about equal."""
    return -(-8 * d_model // (3 * 64)) * 64 if kind in GATED_KINDS else 4 * d_model


def _activation(config: ModelConfig, d_mlp: int) -> nn.Module:
    match config.mlp:
        case "sine" | "sineglu":
            return SineActivation(d_mlp, config.sine_params)
        case "gelu" | "geglu":
            return nn.GELU()
        case "relu2":
            return SquaredReLU()
        case "swiglu":
            return nn.SiLU()
        case kind:
            raise ValueError(f"no activation for the feed-forward kind {kind}")


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
    """``down(act(up(x)))`` with ``gelu``, ``relu2`` or PSANN's ``sine``, whose bias is a phase."""

    def __init__(self, config: ModelConfig, d_mlp: int) -> None:
        super().__init__()
        is_sine = config.mlp == "sine"
        self.up_proj: nn.Module = Linear(config.d_model, d_mlp, bias=is_sine)
        self.activation = _activation(config, d_mlp)
        self.down_proj: nn.Module = Linear(d_mlp, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return _project_down(self.activation, self.up_proj(x), None, self.down_proj)


class GatedMlp(nn.Module):
    """``down(act(gate(x)) * up(x))`` (Shazeer 2020, arXiv 2002.05202) with the sine, GELU or SiLU as gate."""

    def __init__(self, config: ModelConfig, d_mlp: int) -> None:
        super().__init__()
        self.gate_proj = Linear(config.d_model, d_mlp, bias=False)
        self.up_proj = Linear(config.d_model, d_mlp, bias=False)
        self.activation = _activation(config, d_mlp)
        self.down_proj: nn.Module = Linear(d_mlp, config.d_model, bias=False)
        # Both projections as one, in a model prepared for inference.
        self.gate_up_proj: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return _project_down(self.activation, gate, up, self.down_proj)


def build_mlp(config: ModelConfig) -> Mlp | GatedMlp:
    """Build the feed-forward that a resolved ``config`` asks for."""
    if config.mlp is None or config.d_mlp is None:
        raise ValueError("the configuration is not resolved: call models.registry.resolve first")
    return (GatedMlp if config.mlp in GATED_KINDS else Mlp)(config, config.d_mlp)

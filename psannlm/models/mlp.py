"""Feed-forward kinds and their activations. Letters: B rows, T tokens, D width, F hidden features."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from psannlm.config.model import MlpKind, ModelConfig
from psannlm.models.sine import SineActivation

GATED_KINDS: frozenset[MlpKind] = frozenset(("sineglu", "geglu", "swiglu"))


def default_d_mlp(kind: MlpKind, d_model: int) -> int:
    """Return F: 4 D, for the gated kinds 8/3 D rounded up to a multiple of 64, so that parameters are about equal."""
    return -(-8 * d_model // (3 * 64)) * 64 if kind in GATED_KINDS else 4 * d_model


class SquaredReLU(nn.Module):
    """max(z, 0) squared (So et al. 2021, arXiv 2109.08668)."""

    def forward(self, z: Tensor) -> Tensor:
        """Map a tensor of any shape to one of the same shape."""
        return F.relu(z).square()


def _activation(config: ModelConfig, d_mlp: int) -> nn.Module:
    match config.mlp:
        case "sine" | "sineglu":
            return SineActivation(d_mlp, config.sine_params)
        case "gelu" | "geglu":
            return nn.GELU()
        case "relu2":
            return SquaredReLU()
        case _:
            return nn.SiLU()


class Mlp(nn.Module):
    """``down(act(up(x)))``: the PSANN original ``sine`` (with a bias that is its phase), ``gelu`` or ``relu2``."""

    def __init__(self, config: ModelConfig, d_mlp: int) -> None:
        super().__init__()
        is_sine = config.mlp == "sine"
        self.up_proj: nn.Module = nn.Linear(config.d_model, d_mlp, bias=is_sine)
        self.activation = _activation(config, d_mlp)
        self.down_proj: nn.Module = nn.Linear(d_mlp, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        out: Tensor = self.down_proj(self.activation(self.up_proj(x)))
        return out


class GatedMlp(nn.Module):
    """``down(act(gate(x)) * up(x))`` (Shazeer 2020, arXiv 2002.05202) with the sine, GELU or SiLU as gate."""

    def __init__(self, config: ModelConfig, d_mlp: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, d_mlp, bias=False)
        self.up_proj = nn.Linear(config.d_model, d_mlp, bias=False)
        self.activation = _activation(config, d_mlp)
        self.down_proj: nn.Module = nn.Linear(d_mlp, config.d_model, bias=False)
        # Both projections as one, in a model packed for inference.
        self.gate_up_proj: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(self.activation(gate) * up)
        return out


def build_mlp(config: ModelConfig) -> Mlp | GatedMlp:
    """Build the feed-forward that a resolved ``config`` asks for."""
    if config.mlp is None or config.d_mlp is None:
        raise ValueError("the configuration is not resolved: call models.registry.resolve first")
    return (GatedMlp if config.mlp in GATED_KINDS else Mlp)(config, config.d_mlp)

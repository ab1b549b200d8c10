"""Feed-forward kinds against their formulas, at equal parameters."""

from __future__ import annotations

import copy
import math
from typing import Any, get_args

import pytest
import torch
from torch.nn import functional as F

from psannlm.config.model import PHASE_KINDS, QUADRATURE_KINDS, MlpKind, ModelConfig
from psannlm.models.accounting import count_parameters
from psannlm.models.mlp import ACTIVATIONS, KINDS, GatedMlp, Mlp, build_mlp, default_d_mlp
from psannlm.models.registry import resolve


@pytest.mark.parametrize(
    ("kind", "d_model", "d_mlp"),
    [
        ("gelu", 192, 768),
        ("sine", 100, 400),
        ("swiglu", 192, 512),  # 8/3 x 192 is 512 already
        ("sineglu", 512, 1408),  # 1365.3
        ("sineglu", 100, 320),  # 266.7
        ("swiglu", 1, 64),
        ("swiglu", 24, 64),
        ("swiglu", 25, 128),
    ],
)
def test_mlp_default_width(kind: MlpKind, d_model: int, d_mlp: int) -> None:
    assert default_d_mlp(kind, d_model) == d_mlp


@pytest.mark.parametrize("d_model", [192, 512])
def test_mlp_kinds_have_equal_parameters(d_model: int) -> None:
    sizes: dict[str, int] = {}
    for kind in get_args(MlpKind):
        config = ModelConfig(base="transformer", mlp=kind, d_model=d_model, n_heads=8, n_layers=8, vocab_size=4096)
        sizes[kind] = sum(count_parameters(resolve(config)).values())
    assert max(sizes.values()) < 1.02 * min(sizes.values())
    for kind in QUADRATURE_KINDS:
        settings: dict[str, Any] = {"base": "transformer", "mlp": kind, "d_model": d_model, "sine_quadrature": True}
        in_pairs = sum(count_parameters(resolve(ModelConfig(**settings, vocab_size=4096))).values())
        assert in_pairs == pytest.approx(sizes["gelu"], rel=0.01)


def formula(mlp: Mlp | GatedMlp, kind: MlpKind, x: torch.Tensor) -> torch.Tensor:
    up = F.linear(x, mlp.up_proj.weight, mlp.up_proj.bias)
    gate = F.linear(x, mlp.gate_proj.weight) if isinstance(mlp, GatedMlp) else up
    damped = 1.5 * torch.exp(-0.2 * gate.abs())
    gelu, relu2 = 0.5 * gate * (1 + torch.erf(gate / 2**0.5)), gate.clamp(min=0) ** 2
    active = {
        "sine": damped * torch.sin(2.0 * gate),
        "clampedsine": damped * torch.where(gate.abs() < math.pi / 4, torch.sin(2.0 * gate), gate.sign()),
        "gelusine": gelu + 0.1 * torch.sin(2.0 * gate),
        "sinerelu2": torch.where(torch.arange(10) < 5, damped * torch.sin(2.0 * gate), relu2),
        "gelu": gelu,
        "silu": gate / (1 + torch.exp(-gate)),
        "relu2": relu2,
        "tanh": 2 / (1 + torch.exp(-2 * gate)) - 1,
        "sigmoid": 1 / (1 + torch.exp(-gate)),
    }[{"geglu": "gelu", "swiglu": "silu"}.get(kind, kind.removesuffix("glu"))]
    hidden = active * up if isinstance(mlp, GatedMlp) else active
    return F.linear(hidden, mlp.down_proj.weight)


@pytest.mark.parametrize("kind", get_args(MlpKind))
def test_mlp_kinds_match_their_formulas(kind: MlpKind) -> None:
    torch.manual_seed(0)
    sine = {"amp_init": 1.5, "freq_init": 2.0, "damp_init": 0.2}
    mlp = build_mlp(ModelConfig(mlp=kind, d_model=6, n_heads=1, d_mlp=10, sine_params=sine))
    assert isinstance(mlp, (Mlp, GatedMlp))
    precise = copy.deepcopy(mlp).double()
    x = torch.randn(2, 3, 6)
    values, expected = mlp(x), formula(precise, kind, x.double())
    torch.testing.assert_close(values, expected.float(), rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(values)
    (values * weights).sum().backward()
    (expected * weights).sum().backward()
    # The formula's sine has constants: the gradients of amplitude, frequency and decay are those of test_damped_sine.
    matrices = {name: p for name, p in precise.named_parameters() if "activation" not in name}
    for name, parameter in matrices.items():
        found = mlp.get_parameter(name).grad
        assert found is not None
        assert parameter.grad is not None
        torch.testing.assert_close(found, parameter.grad.float(), rtol=1e-4, atol=1e-5)
    # Of all linear maps only the sine's has a bias: it is the phase.
    assert [name for name, _ in mlp.named_parameters() if "bias" in name] == (
        ["up_proj.bias"] if kind in ("sine", "clampedsine") else []
    )


def test_mlp_kinds_table_is_complete() -> None:
    assert set(KINDS) == set(get_args(MlpKind))
    assert {kind.activation for kind in KINDS.values()} == set(ACTIVATIONS)
    has_sine = {name for name, kind in KINDS.items() if "sine" in kind.activation}
    assert has_sine == PHASE_KINDS
    assert {name for name, kind in KINDS.items() if kind.activation == "sine"} == QUADRATURE_KINDS
    # Exports name the activation and the gate: no two kinds may share both.
    assert len({(kind.activation, kind.is_gated) for kind in KINDS.values()}) == len(KINDS)


@pytest.mark.parametrize("kind", ["swiglu", "gelu", "sine"])
def test_activation_norm_is_on_the_activation_input_alone(kind: MlpKind) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"mlp": kind, "d_model": 6, "n_heads": 1, "d_mlp": 10, "norm_eps": 1e-3}
    mlp = build_mlp(ModelConfig(**settings, activation_norm=True))
    plain = build_mlp(ModelConfig(**settings)).double()
    plain.load_state_dict(mlp.state_dict())
    x = torch.randn(2, 3, 6)
    with torch.no_grad():
        z = (plain.gate_proj if isinstance(plain, GatedMlp) else plain.up_proj)(x.double())
        hidden = plain.activation(z / (z.square().mean(-1, keepdim=True) + 1e-3).sqrt())
        if isinstance(plain, GatedMlp):
            hidden = hidden * plain.up_proj(x.double())
        torch.testing.assert_close(mlp(x).double(), plain.down_proj(hidden), rtol=1e-5, atol=1e-6)


def test_mlp_unresolved_config_raises() -> None:
    with pytest.raises(ValueError, match="resolve"):
        build_mlp(ModelConfig())

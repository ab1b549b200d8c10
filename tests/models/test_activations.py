"""Variants of the sine against formulas in float64: values, and gradients of the input and of every parameter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from psannlm.config.model import SineConfig
from psannlm.kernels.compile import compiled
from psannlm.models.activations import (
    ADDED_SINE_WEIGHT,
    ClampedSine,
    GainedActivation,
    GeluSine,
    ParametricActivation,
    PhasedSine,
    QuadratureSine,
    SineActivation,
    SineSquaredReLU,
    is_activation_parameter,
)

N_FEATURES = 6
# Large enough that f z leaves [-π/2, π/2] in both directions.
Z = torch.linspace(-4, 4, 5 * N_FEATURES).view(5, N_FEATURES)
SINE = SineConfig(
    amp_init=1.5, freq_init=1.3, damp_init=0.2, amp_std=0.2, freq_std=0.2, damp_std=0.05, freq_bounds=(0.5, 2.0)
)
Formula = Callable[[Tensor, dict[str, Tensor]], Tensor]


def positive(raw: Tensor) -> Tensor:
    return torch.log1p(torch.exp(raw))


def bounded(raw: Tensor) -> Tensor:
    return positive(raw).clamp(0.5, 2.0)


def damped(z: Tensor, p: dict[str, Tensor], sine: Tensor, prefix: str = "") -> Tensor:
    return positive(p[f"{prefix}raw_amplitude"]) * torch.exp(-positive(p[f"{prefix}raw_decay"]) * z.abs()) * sine


def clamped_sine(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    angle = bounded(p["raw_frequency"]) * z
    return damped(z, p, torch.where(angle.abs() < math.pi / 2, torch.sin(angle), angle.detach().sign()))


def phased_sine(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    angle = bounded(p["raw_frequency"]) * z
    return damped(z, p, torch.sin(angle) * torch.cos(p["phase"]) + (torch.cos(angle) - 1) * torch.sin(p["phase"]))


def clamped_phased_sine(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    angle = bounded(p["raw_frequency"]) * z + p["phase"]
    clamped = torch.where(angle.abs() < math.pi / 2, torch.sin(angle), angle.detach().sign())
    return damped(z, p, clamped - torch.sin(p["phase"]))


def sine_and_cosine(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    angle = bounded(p["raw_frequency"]) * z
    both = torch.cat((torch.sin(angle), torch.sin(angle + math.pi / 2)), -1)
    envelope = torch.exp(-positive(p["raw_decay"]) * z.abs()).repeat(1, 2)
    return (positive(p["raw_amplitude"]) * (envelope * both)[:, : p["raw_amplitude"].numel()]).squeeze()


def gelu_phased_sine(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    gelu = 0.5 * z * (1 + torch.erf(z / 2**0.5))
    sine = torch.sin(bounded(p["raw_frequency"]) * z + p["phase"]) - torch.sin(p["phase"])
    return gelu + p["sine_weight"] * sine


def gelu_sine(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    gelu = 0.5 * z * (1 + torch.erf(z / 2**0.5))
    return gelu + p["sine_weight"] * torch.sin(bounded(p["raw_frequency"]) * z)


def sine_relu2(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    z, others = z.chunk(2, -1)
    sines = damped(z, p, torch.sin(bounded(p["sine.raw_frequency"]) * z), "sine.")
    return torch.cat((sines, torch.where(others > 0, others**2, 0)), -1)


def gained_silu(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    z = positive(p["raw_input_gain"]) * z
    return positive(p["raw_output_gain"]) * z / (1 + torch.exp(-z))


def gained_sine(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    z = positive(p["raw_input_gain"]) * z
    sine = damped(z, p, torch.sin(bounded(p["activation.raw_frequency"]) * z), "activation.")
    return positive(p["raw_output_gain"]) * sine


FORMULAS: dict[str, tuple[Callable[[], nn.Module], Formula]] = {
    "clampedsine": (lambda: ClampedSine(N_FEATURES, SINE, None), clamped_sine),
    "gelusine": (lambda: GeluSine(N_FEATURES, SINE, None), gelu_sine),
    "sinerelu2": (lambda: SineSquaredReLU(N_FEATURES, SINE, None), sine_relu2),
    "phased sine": (lambda: PhasedSine(N_FEATURES, SINE, 0.8), phased_sine),
    "phased clampedsine": (lambda: ClampedSine(N_FEATURES, SINE, 0.8), clamped_phased_sine),
    "phased gelusine": (lambda: GeluSine(N_FEATURES, SINE, 0.8), gelu_phased_sine),
    "quadrature": (lambda: QuadratureSine(2 * N_FEATURES, SINE), sine_and_cosine),
    "quadrature, odd": (lambda: QuadratureSine(2 * N_FEATURES - 1, SINE), sine_and_cosine),
    "gained silu": (lambda: GainedActivation(nn.SiLU(), N_FEATURES), gained_silu),
    "gained sine": (lambda: GainedActivation(SineActivation(N_FEATURES, SINE), N_FEATURES), gained_sine),
}


def built(name: str) -> nn.Module:
    """Return the activation with parameters of which no two features have the same."""
    torch.manual_seed(0)
    activation = FORMULAS[name][0]()
    with torch.no_grad():
        for parameter in activation.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return activation


def value_and_gradients(function: Callable[[Tensor], Tensor], z: Tensor, *parameters: Tensor) -> list[Tensor]:
    z = z.clone().requires_grad_()
    y = function(z)
    weights = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)
    return [y, *torch.autograd.grad((y * weights).sum(), (z, *parameters))]


@pytest.mark.parametrize("name", FORMULAS)
def test_activation_matches_its_formula(name: str) -> None:
    activation = built(name)
    precise = {key: p.detach().double().requires_grad_() for key, p in activation.named_parameters()}
    found = value_and_gradients(activation, Z, *activation.parameters())
    expected = value_and_gradients(lambda z: FORMULAS[name][1](z, precise), Z.double(), *precise.values())
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value, exact.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
def test_activation_keeps_bfloat16_and_computes_in_float32(name: str) -> None:
    activation = built(name)
    z = Z.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = activation(z)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, activation(z.float()).bfloat16())


@pytest.mark.parametrize("name", FORMULAS)
def test_frozen_activation_is_unchanged_by_training(name: str) -> None:
    activation = built(name)
    before = activation(Z)
    for module in activation.modules():
        if isinstance(module, ParametricActivation):
            module.freeze()
    with torch.no_grad():
        for parameter in activation.parameters():
            parameter.add_(1.0)
    assert torch.equal(activation(Z), before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("name", FORMULAS)
def test_compiled_activation_matches_eager(name: str) -> None:
    activation = built(name)
    plain, fused = (
        value_and_gradients(function, Z, *activation.parameters()) for function in (activation, compiled(activation))
    )
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def test_parameters_of_activations_are_recognized_by_name() -> None:
    for name in FORMULAS:
        assert all(is_activation_parameter(f"blocks.0.mlp.activation.{key}") for key in built(name).state_dict())
    for key in ("up_proj.bias", "up_proj.weight", "mlp_norm.weight", "mlp_scale"):
        assert not is_activation_parameter(f"blocks.0.mlp.{key}")


def test_clamped_sine_is_monotone_without_decay() -> None:
    z = torch.linspace(-20, 20, 401)[:, None]
    settings: dict[str, Any] = {"freq_init": 2.0, "decay_mode": "none"}
    clamped, sine = (
        activation(z)
        for activation in (ClampedSine(1, SineConfig(**settings), None), SineActivation(1, SineConfig(**settings)))
    )
    assert (clamped.diff(dim=0) >= 0).all()
    assert clamped.abs().max() <= 1 + 1e-6
    inside = z.abs() < math.pi / 4
    torch.testing.assert_close(clamped[inside], sine[inside])


def test_clamped_sine_takes_parameters_of_a_sine() -> None:
    clamped, sine = ClampedSine(4, SINE, None), SineActivation(4, SINE)
    clamped.load_state_dict(sine.state_dict())
    near = torch.linspace(-0.1, 0.1, 8).view(2, 4)
    torch.testing.assert_close(clamped(near), sine(near))


def test_gains_start_as_the_activation_alone() -> None:
    torch.testing.assert_close(GainedActivation(nn.GELU(), N_FEATURES)(Z), nn.functional.gelu(Z))


def test_gelu_sine_starts_near_gelu_and_learns_weight() -> None:
    assert GeluSine(3, SineConfig(), None).value_of("sine_weight").tolist() == pytest.approx([ADDED_SINE_WEIGHT] * 3)
    without = GeluSine(3, SineConfig(learnable=("frequency",)), None)
    assert [name for name, _ in without.named_parameters()] == ["raw_frequency"]
    assert "sine_weight" in without.state_dict()
    with torch.no_grad():
        without.sine_weight.zero_()  # type: ignore[operator]
    torch.testing.assert_close(without(Z[:, :3]), nn.functional.gelu(Z[:, :3]))

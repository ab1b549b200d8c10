"""Damped sine against float64 and autograd on every path, its saved tensors, and the effect of each setting."""

from __future__ import annotations

import re
import shutil
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from psannlm.config.model import SineConfig
from psannlm.kernels import damped_sine as damped_sine_module
from psannlm.kernels.damped_sine import damped_sine
from psannlm.models.activations import SineActivation, inverse_softplus

MODES = ("abs", "relu", "none")
N_FEATURES = 5
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="no C++ compiler for torch.compile"
)


def reference(z: Tensor, amplitude: Tensor, frequency: Tensor, decay: Tensor, mode: str) -> Tensor:
    """The formula itself, in float64, for autograd to differentiate."""
    envelope = {"abs": z.abs(), "relu": z.relu(), "none": torch.zeros_like(z)}[mode]
    return amplitude * torch.exp(-decay * envelope) * torch.sin(frequency * z)


def inputs(n_rows: int, dtype: torch.dtype, scale: float = 3.0, seed: int = 0) -> list[Tensor]:
    """z, A, f, d and the gradient of y, zeros and large values among the z."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n_rows, N_FEATURES, generator=generator) * scale
    z[::3, 0] = 0.0
    z[1::4, 1] = 40.0
    z[::4, 2] = -40.0
    amplitude, frequency = (torch.rand(N_FEATURES, generator=generator) + 0.5 for _ in range(2))
    decay = torch.rand(N_FEATURES, generator=generator) * 0.3 + 0.01
    grad = torch.randn(n_rows, N_FEATURES, generator=generator)
    return [z.to(dtype), amplitude, frequency, decay, grad.to(dtype)]


def value_and_gradients(function: Any, tensors: list[Tensor], grad: Tensor, mode: str) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves, mode)
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def assert_matches_reference(found: list[Tensor], tensors: list[Tensor], grad: Tensor, mode: str) -> None:
    wanted = value_and_gradients(reference, [t.double() for t in tensors], grad.double(), mode)
    for name, ours, exact in zip(("y", "z", "A", "f", "d"), found, wanted, strict=True):
        low = ours.dtype != torch.float32
        # Half a unit in the last place of the dtype, or the float32 error of a phase of about 60 radians.
        rtol = 2 * torch.finfo(ours.dtype).eps if low else 2e-5
        torch.testing.assert_close(ours.double(), exact, rtol=rtol, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("n_rows", [0, 1, 2, 6, 7, 23])
def test_damped_sine_matches_float64(
    mode: str, dtype: torch.dtype, n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three rows to a block and thread, so that the last block is ragged.
    monkeypatch.setattr(damped_sine_module, "_BLOCK_ELEMENTS", 3 * N_FEATURES + 1)
    *tensors, grad = inputs(n_rows, dtype)
    found = value_and_gradients(damped_sine, tensors, grad, mode)
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32, torch.float32, torch.float32]
    if dtype == torch.float64:
        found = [t.float() for t in found]
    assert_matches_reference(found, tensors, grad, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_damped_sine_formula_matches_float64(mode: str, dtype: torch.dtype) -> None:
    *tensors, grad = inputs(23, dtype)
    found = [
        damped_sine_module.damped_sine_formula(*tensors, mode),
        *damped_sine_module._gradients(grad, *tensors, mode),
    ]
    assert_matches_reference(found, tensors, grad, mode)


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_damped_sine_compiled_matches_float64(mode: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    value, gradients = damped_sine_module._compiled()
    for n_rows in (23, 3 * damped_sine_module._ROWS_SUMMED):
        *tensors, grad = inputs(n_rows, dtype)
        assert_matches_reference([value(*tensors, mode), *gradients(grad, *tensors, mode)], tensors, grad, mode)


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore")
def test_damped_sine_compiled_backward_computes_sine_once() -> None:
    from torch._inductor.utils import run_and_get_code

    *tensors, grad = inputs(3 * damped_sine_module._ROWS_SUMMED, torch.float32)
    torch._dynamo.reset()
    _, code = run_and_get_code(damped_sine_module._compiled()[1], grad, *tensors, "abs")
    (source,) = code
    for function in ("sin", "cos", "exp"):
        # Once for whole vectors, once for what is left of a row.
        assert 1 <= len(re.findall(rf"(?:\.|std::){function}\(", source)) <= 2, source


@pytest.mark.parametrize("block_elements", [1, N_FEATURES, 4 * N_FEATURES, 7 * N_FEATURES, 1000])
def test_damped_sine_is_independent_of_block_size(block_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    *tensors, grad = inputs(29, torch.float32)
    whole = value_and_gradients(damped_sine, tensors, grad, "abs")
    monkeypatch.setattr(damped_sine_module, "_BLOCK_ELEMENTS", block_elements)
    blocked = value_and_gradients(damped_sine, tensors, grad, "abs")
    assert torch.equal(whole[0], blocked[0])
    assert torch.equal(whole[1], blocked[1])
    for ours, theirs in zip(blocked[2:], whole[2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_damped_sine_accepts_any_shape_and_stride(mode: str) -> None:
    *tensors, grad = inputs(24, torch.float32)
    flat = value_and_gradients(damped_sine, tensors, grad, mode)
    for shape in ((2, 3, 4, N_FEATURES), (24, 1, N_FEATURES)):
        shaped = value_and_gradients(damped_sine, [tensors[0].view(shape), *tensors[1:]], grad.view(shape), mode)
        assert torch.equal(shaped[0].view(24, -1), flat[0])
        assert torch.equal(shaped[1].view(24, -1), flat[1])
    transposed = tensors[0].t().contiguous().t()
    assert torch.equal(damped_sine(transposed, *tensors[1:], mode), flat[0])
    over_features = grad[:, :1].expand(-1, N_FEATURES)  # a gradient of stride 0, as a sum gives
    assert torch.equal(
        value_and_gradients(damped_sine, tensors, over_features, mode)[1],
        value_and_gradients(damped_sine, tensors, over_features.contiguous(), mode)[1],
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1e3, 1e6, 1e30])
def test_damped_sine_large_inputs_are_finite_and_damped(mode: str, size: float) -> None:
    z = torch.tensor([[size], [-size]])
    amplitude, frequency, decay = torch.tensor([[1.5], [1.0], [0.05]])
    found = value_and_gradients(damped_sine, [z, amplitude, frequency, decay], torch.ones(2, 1), mode)
    assert all(torch.isfinite(t).all() for t in found)
    limits = {"abs": (0.0, 0.0), "relu": (0.0, 1.5), "none": (1.5, 1.5)}[mode]
    for y, limit in zip(found[0].flatten().tolist(), limits, strict=True):
        assert abs(y) <= limit + 1.5 * 2.718281828 ** (-0.05 * size) + 1e-7


def test_damped_sine_saves_only_z() -> None:
    z = torch.randn(400, 30, dtype=torch.bfloat16, requires_grad=True)
    activation = SineActivation(30, SineConfig())
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        activation(z)
    large = [t for t in saved.values() if t.numel() >= 400]
    assert [t.data_ptr() for t in large] == [z.data_ptr()]
    assert sum(t.nbytes for t in saved.values()) <= z.nbytes + 10 * 30 * 4


def test_damped_sine_computes_in_float32_under_autocast() -> None:
    activation = SineActivation(3, SineConfig())
    z = torch.linspace(-3, 3, 30).view(10, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(activation(z), activation(z).float())
        inside = activation(z)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, activation(z))


@pytest.mark.parametrize("value", [1e-8, 1e-3, 0.01, 0.7, 1.0, 5.0, 30.0, 200.0])
def test_inverse_softplus_inverts(value: float) -> None:
    raw = inverse_softplus(torch.tensor(value, dtype=torch.float64))
    assert torch.nn.functional.softplus(raw).item() == pytest.approx(value, rel=1e-9)


def test_sine_activation_starts_at_configured_values() -> None:
    activation = SineActivation(4, SineConfig(amp_init=1.25, freq_init=2.5, damp_init=0.01))
    for name, value in (("amplitude", 1.25), ("frequency", 2.5), ("decay", 0.01)):
        torch.testing.assert_close(activation.value_of(name), torch.full((4,), value), rtol=1e-6, atol=0.0)


BOUNDS = {"amp_bounds": (0.5, 1.5), "freq_bounds": (0.25, 4.0), "damp_bounds": (0.001, 0.1)}


@pytest.mark.parametrize("name", ["amplitude", "frequency", "decay"])
@pytest.mark.parametrize("raw", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_sine_activation_values_are_positive_and_bounded(name: str, raw: float) -> None:
    free, bound = SineActivation(4, SineConfig()), SineActivation(4, SineConfig(**BOUNDS))
    low, high = dict(zip(("amplitude", "frequency", "decay"), BOUNDS.values(), strict=True))[name]
    for activation in (free, bound):
        with torch.no_grad():
            getattr(activation, f"raw_{name}").fill_(raw)
    assert (free.value_of(name) >= 0).all()
    # The bounds are float32 numbers once they are tensors.
    assert (bound.value_of(name) >= torch.tensor(low)).all()
    assert (bound.value_of(name) <= torch.tensor(high)).all()
    if raw <= -30.0:
        assert torch.equal(bound.value_of(name), torch.full((4,), low))


@pytest.mark.parametrize(
    "subset", [s for n in range(4) for s in combinations(("amplitude", "frequency", "decay"), n)], ids=str
)
def test_sine_activation_gradients_reach_only_learnable(subset: tuple[str, ...]) -> None:
    activation = SineActivation(3, SineConfig(learnable=subset))
    z = torch.linspace(-2, 2, 12).view(4, 3).requires_grad_()
    activation(z).pow(2).sum().backward()
    assert z.grad is not None
    with_gradient = {name for name, p in activation.named_parameters() if p.grad is not None and p.grad.abs().min() > 0}
    assert with_gradient == dict(activation.named_parameters()).keys() == {f"raw_{name}" for name in subset}
    # What does not learn is still part of the model's file.
    assert activation.state_dict().keys() == {"raw_amplitude", "raw_frequency", "raw_decay"}


def test_sine_activation_trainable_false_freezes_all() -> None:
    activation = SineActivation(3, SineConfig(trainable=False))
    assert not list(activation.parameters())
    assert not activation(torch.ones(2, 3)).requires_grad


@pytest.mark.parametrize("key", ["amp_std", "freq_std", "damp_std"])
def test_sine_activation_spread_is_positive_and_seeded(key: str) -> None:
    name = {"amp_std": "amplitude", "freq_std": "frequency", "damp_std": "decay"}[key]

    def spread(seed: int, std: float) -> Tensor:
        torch.manual_seed(seed)
        return SineActivation(4000, SineConfig(damp_init=1.0, **{key: std})).value_of(name)

    assert torch.equal(spread(0, 0.1), spread(0, 0.1))
    assert not torch.equal(spread(0, 0.1), spread(1, 0.1))
    assert spread(0, 0.1).mean().item() == pytest.approx(1.0, abs=0.01)
    assert spread(0, 0.1).std().item() == pytest.approx(0.1, rel=0.05)
    assert (spread(0, 5.0) > 0).all()


@pytest.mark.parametrize(
    "change",
    [
        {"amp_init": 1.1},
        {"amp_std": 0.2},
        {"freq_init": 1.1},
        {"freq_std": 0.2},
        {"damp_init": 0.3},
        {"damp_std": 0.2},
        {"decay_mode": "relu"},
        {"decay_mode": "none"},
        {"trainable": False},
        {"learnable": ("amplitude",)},
        {"amp_bounds": (0.9, 1.1)},
        {"freq_bounds": (0.9, 1.1)},
        {"damp_bounds": (0.15, 0.25)},
    ],
    ids=str,
)
def test_sine_activation_every_setting_has_effect(change: dict[str, Any]) -> None:
    name = next(iter(change))
    # A bound shows only where the spread goes past it.
    common = {"damp_init": 0.2, **({f"{name.split('_')[0]}_std": 0.5} if name.endswith("bounds") else {})}

    def outcome(settings: dict[str, Any]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        activation = SineActivation(6, SineConfig(**settings))
        z = torch.linspace(-3, 3, 24).view(4, 6).requires_grad_()
        y = activation(z)
        y.pow(2).sum().backward()
        return {"y": y.detach(), **{n: p.grad for n, p in activation.named_parameters() if p.grad is not None}}

    before, after = outcome(common), outcome({**common, **change})
    assert before.keys() != after.keys() or any(not torch.equal(before[n], after[n]) for n in before)

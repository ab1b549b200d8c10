"""GPU-01 and GPU-02: detection of wrong gradients and of precisions that train differently."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from psannlm.gpu_suite.checks import numerics
from psannlm.gpu_suite.checks.numerics import (
    Gradients,
    check_gradients,
    check_precision,
    curve_measures,
    gradient_measures,
    scale_measure,
)
from psannlm.gpu_suite.context import DRY_RUN, CheckContext
from psannlm.kernels import recompute


def test_gradients_match_float64(context: CheckContext) -> None:
    result = check_gradients(context)
    assert result.status == "ok", result.problems()
    # Loss and gradient in two precisions, of three bases with three position schemes; and that all are numbers.
    assert len(result.measures) == 1 + 2 * 2 * 3 * 3


def test_gradient_check_detects_error_of_a_thousandth(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    original = recompute.gated_gradients

    def perturbed(*arguments: Any) -> Any:
        value, grad_up, (amplitude, frequency, decay) = original(*arguments)
        return value, grad_up, (amplitude, frequency * 1.001, decay)

    monkeypatch.setattr(recompute, "gated_gradients", perturbed)
    missed = {measure.name for measure in check_gradients(context).missed}
    assert missed == {
        f"{base}, {positions}, float32: gradient"
        for base in ("respsann", "waveresnet")
        for positions in ("rope", "alibi", "sinusoidal")
    }


def test_gradient_check_detects_non_finite_gradient(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    original = recompute.gated_gradients

    def broken(grad: torch.Tensor, *arguments: Any) -> Any:
        found = original(grad, *arguments)
        grad.fill_(float("nan"))
        return found

    monkeypatch.setattr(recompute, "gated_gradients", broken)
    result = check_gradients(context)
    assert result.measures[0].value == 12, "two bases with a sine, three schemes, two precisions"
    assert not result.measures[0].is_met


@pytest.mark.parametrize(
    ("dtype", "loss", "gradient", "missed"),
    [
        (torch.float32, 1.0, 1.0, []),
        (torch.float32, 1.000_02, 1.0, ["b, float32: loss"]),
        (torch.float32, 1.0, 1.000_2, ["b, float32: gradient"]),
        (torch.bfloat16, 1.005, 1.05, []),
        (torch.bfloat16, 0.98, 1.05, ["b, bfloat16: loss"]),
        (torch.bfloat16, 1.005, 1.2, ["b, bfloat16: gradient"]),
        (torch.bfloat16, 1.005, -1.0, ["b, bfloat16: gradient"]),
    ],
)
def test_loss_and_gradient_limits(dtype: torch.dtype, loss: float, gradient: float, missed: list[str]) -> None:
    """All of them of numbers: a precision that is wrong need not overflow."""
    reference = Gradients(1.0, {"a": torch.ones(4).double(), "b": torch.full((4,), 2.0).double()})
    found = Gradients(loss, {name: value * gradient for name, value in reference.by_name.items()})
    assert [m.name for m in gradient_measures("b", dtype, found, reference) if not m.is_met] == missed


def test_missing_gradient_has_infinite_error(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    original = numerics.device_gradients

    def without(*arguments: Any) -> Any:
        found = original(*arguments)
        return replace(found, by_name={n: g for n, g in found.by_name.items() if n != "embedding.weight"})

    monkeypatch.setattr(numerics, "device_gradients", without)
    result = check_gradients(context)
    names = [measure.name for measure in result.measures]
    assert {measure.name for measure in result.missed} == {name for name in names if name.endswith(": gradient")}


@pytest.mark.slow
def test_low_precision_losses_match_float32(context: CheckContext) -> None:
    short = replace(context, sizes=replace(DRY_RUN, n_steps=8))
    result = check_precision(short)
    assert result.status == "ok", result.problems()
    assert len(result.series["waveresnet, float16"]) == 8


def test_precision_check_detects_other_losses() -> None:
    exact = [5.0, 4.5, 4.0]
    curves = {torch.float32: exact, torch.bfloat16: [5.0, 4.5, 4.055], torch.float16: [5.0, 4.501, 4.0]}
    missed = [measure.name for measure in curve_measures("b", curves) if not measure.is_met]
    assert missed == ["b, bfloat16: largest distance"]
    flat = {dtype: [5.0, 5.0] for dtype in curves}
    assert [m.name for m in curve_measures("b", flat) if not m.is_met] == ["b: fall of the float32 loss"]
    lost = {**curves, torch.float16: [5.0, float("nan"), 4.0]}
    missed = [m.name for m in curve_measures("b", lost) if not m.is_met]
    assert {"b, float16: mean distance", "b, float16: largest distance"} <= set(missed)
    exact_lost = {**curves, torch.float32: [5.0, float("nan"), 4.0]}
    assert "b: fall of the float32 loss" in [m.name for m in curve_measures("b", exact_lost) if not m.is_met]
    assert not scale_measure("b", 9).is_met


@pytest.mark.parametrize(
    ("dtype", "distances", "missed"),
    [
        (torch.bfloat16, [0.0, 0.03, 0.04], ["mean distance"]),
        (torch.bfloat16, [0.0, 0.0, 0.055], ["largest distance"]),
        (torch.bfloat16, [0.0, 0.0, 3.0], ["mean distance", "largest distance"]),
        (torch.float16, [0.0, 0.008, 0.01], ["mean distance"]),
        (torch.float16, [0.0, 0.0, 0.014, 0.0], []),
        (torch.float16, [0.0, 0.0, 0.021, 0.0, 0.0], ["largest distance"]),
        (torch.float16, [0.0, 0.0, 3.0], ["mean distance", "largest distance"]),
    ],
)
def test_low_precision_limits(dtype: torch.dtype, distances: list[float], missed: list[str]) -> None:
    exact = [5.0 - step / 2 for step in range(len(distances))]
    curves = {torch.float32: exact, torch.bfloat16: exact, torch.float16: exact}
    for sign in (1.0, -1.0):
        curves[dtype] = [loss + sign * distance for loss, distance in zip(exact, distances, strict=True)]
        name = f"b, {str(dtype).removeprefix('torch.')}"
        expected = [f"{name}: {what}" for what in missed]
        assert [m.name for m in curve_measures("b", curves) if not m.is_met] == expected


def test_non_finite_reference_has_infinite_error() -> None:
    found = Gradients(1.0, {"a": torch.ones(2), "b": torch.ones(2)})
    broken = Gradients(1.0, {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])})
    assert found.worst_error(found) == found.whole_error(found) == 0.0
    for one, other in ((found, broken), (broken, found)):
        assert one.worst_error(other) == one.whole_error(other) == float("inf")

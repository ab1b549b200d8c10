"""Every matrix product reads what a visit returned, once per pass; moments are numpy's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psannlm.evaluation.matrix_inputs import ActivationMoments, MatrixInput, matrix_inputs, visit_inputs
from psannlm.generation.quantize import prepare_for_inference
from psannlm.models.transformer import Transformer

KINDS: list[dict[str, Any]] = [
    {"mlp": "sine"},
    {"mlp": "sineglu", "tie_embeddings": False},
    {"mlp": "swiglu", "qkv_features": "fan"},
    {"mlp": "gelu", "base": "waveresnet"},
]
IDS = torch.randint(0, 17, (2, 9), generator=torch.Generator().manual_seed(3))
LABELS = torch.randint(0, 17, (2, 9), generator=torch.Generator().manual_seed(4))


def loss(model: Transformer) -> float:
    with torch.no_grad():
        return float(model(IDS, LABELS))


@pytest.mark.parametrize("settings", KINDS, ids=lambda each: each["mlp"])
def test_visits_are_one_per_input_and_pass(settings: dict[str, Any], build_tiny: Callable[..., Transformer]) -> None:
    model = build_tiny(**settings)
    seen: Counter[tuple[str, int | None]] = Counter()
    with visit_inputs(matrix_inputs(model), lambda where, x: seen.update([(where.place, where.layer)])):
        loss(model)
        loss(model)
    assert set(seen.values()) == {2}
    layers = Counter(place for place, _ in seen)
    assert layers.pop("head") == 1
    places = {"qkv", "attention_output", "gate_up", "down"} | (
        {"qkv_features"} if "qkv_features" in settings else set()
    )
    assert layers == dict.fromkeys(places, 2)


@pytest.mark.parametrize("settings", KINDS, ids=lambda each: each["mlp"])
def test_visit_zeros_equal_zero_weights(settings: dict[str, Any], build_tiny: Callable[..., Transformer]) -> None:
    """A product of zeros is that of zero weights, whichever path of the model computes it."""
    model = build_tiny(**settings)
    plain = loss(model)
    for each in matrix_inputs(model):
        if each.place == "head":
            continue
        with visit_inputs([each], lambda where, x: torch.zeros_like(x)):
            found = loss(model)
        matrices = [module for module in each.modules if isinstance(module, nn.Linear)]
        kept = [matrix.weight.detach().clone() for matrix in matrices]
        with torch.no_grad():
            for matrix in matrices:
                matrix.weight.zero_()
            expected = loss(model)
            for matrix, weight in zip(matrices, kept, strict=True):
                matrix.weight.copy_(weight)
        assert found == pytest.approx(expected, rel=1e-6)
        assert found != pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_head_reads_what_its_visit_returned(tie_embeddings: bool, build_tiny: Callable[..., Transformer]) -> None:
    model = build_tiny(tie_embeddings=tie_embeddings)
    hidden = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(5))
    with visit_inputs(matrix_inputs(model)[-1:], lambda where, x: hidden):
        found = loss(model)
    expected = F.cross_entropy(
        (hidden @ model.output_weight.detach().T).flatten(0, 1), LABELS.flatten(), reduction="sum"
    )
    assert found == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("fails", [False, True])
def test_visits_leave_the_model_as_it_was(fails: bool, build_tiny: Callable[..., Transformer]) -> None:
    model = build_tiny(mlp="swiglu")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = loss(model)

    def visit(where: MatrixInput, x: Tensor) -> Tensor:
        if fails and where.place == "down":
            raise RuntimeError("stop")
        return 2 * x

    with pytest.raises(RuntimeError, match="stop") if fails else nullcontext():
        with visit_inputs(matrix_inputs(model), visit):
            loss(model)
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert loss(model) == plain


def test_matrix_inputs_refuse_models_that_hooks_miss(build_tiny: Callable[..., Transformer]) -> None:
    with pytest.raises(ValueError, match="prepared for inference"):
        matrix_inputs(prepare_for_inference(build_tiny(mlp="swiglu"), "float32"))
    extended = build_tiny()
    extended.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="extra"):
        matrix_inputs(extended)


def test_moments_are_those_of_numpy() -> None:
    random = np.random.default_rng(0)
    values = random.standard_t(5, (6, 50)).astype(np.float32) + 0.5
    values[0, 0] = -30  # in the first of two passes
    moments = ActivationMoments()
    moments.add(torch.from_numpy(values[:2]))
    moments.add(torch.from_numpy(values[2:]).view(2, 2, 50))
    wide = values.astype(np.float64)
    centred = wide - wide.mean()
    assert moments.kurtosis == pytest.approx((centred**4).mean() / wide.var() ** 2, rel=1e-9)
    assert moments.rms == pytest.approx(np.sqrt((wide**2).mean()), rel=1e-12)
    assert moments.max_over_rms == pytest.approx(np.abs(wide).max() / np.sqrt((wide**2).mean()), rel=1e-12)
    constant = ActivationMoments()
    constant.add(torch.zeros(4))
    assert math.isnan(constant.kurtosis)
    assert math.isnan(constant.max_over_rms)

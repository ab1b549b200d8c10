"""Features before attention against formulas in float64, and the equal size of the control."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from psannlm.config.model import ModelConfig, QkvFeaturesKind
from psannlm.models.accounting import count_parameters
from psannlm.models.attention import Attention
from psannlm.models.qkv_features import QkvFeatures
from psannlm.models.registry import resolve


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def formula(kind: QkvFeaturesKind, weight: Tensor, x: Tensor) -> Tensor:
    z, r = x @ weight[:2].T, x @ weight[2:].T
    return torch.cat(
        {
            "fan": (torch.cos(z), torch.sin(z), gelu(r)),
            "fan_linear": (torch.cos(z), torch.sin(z), r),
            "gelu": (gelu(z), gelu(-z), gelu(r)),
        }[kind],
        -1,
    )


@pytest.mark.parametrize("kind", get_args(QkvFeaturesKind))
def test_qkv_features_match_their_formula(kind: QkvFeaturesKind) -> None:
    torch.manual_seed(0)
    features = QkvFeatures(10, kind)  # two rows of pairs, six others
    weight = features.proj.weight
    assert isinstance(weight, Tensor)
    assert weight.shape == (8, 10)
    precise, x = weight.detach().double().requires_grad_(), torch.randn(2, 3, 10) * 3
    wide = x.double().requires_grad_()
    x.requires_grad_()
    found, expected = features(x), formula(kind, precise, wide)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    factors = torch.cos(torch.arange(found.numel())).view(found.shape)
    gradients = torch.autograd.grad((found * factors).sum(), (weight, x))
    exact = torch.autograd.grad((expected * factors).sum(), (precise, wide))
    for gradient, wanted in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient, wanted.float(), rtol=1e-4, atol=1e-4)


def test_qkv_features_feed_all_three_projections() -> None:
    attention = Attention(ModelConfig(d_model=12, n_heads=2, qkv_features="fan"))
    x = torch.randn(1, 4, 12)
    assert attention.features is not None
    inputs = attention.features(x)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    for found, projection in zip(attention.project(x), projections, strict=True):
        assert torch.equal(found, projection(inputs))


def test_control_of_fan_has_its_parameters() -> None:
    sizes = {
        kind: count_parameters(resolve(ModelConfig(d_model=128, vocab_size=99, qkv_features=kind)))
        for kind in (None, *get_args(QkvFeaturesKind))
    }
    assert sizes["fan"] == sizes["fan_linear"] == sizes["gelu"]
    assert sizes["fan"]["attention"] - sizes[None]["attention"] == 8 * 96 * 128

"""Variants of the feed-forward in whole models: decoding, files, preparation for inference, counts and optimizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from psannlm.config.model import ModelConfig, PositionKind
from psannlm.generation.engine import Engine
from psannlm.generation.quantize import prepare_for_inference
from psannlm.kernels.compile import compiled
from psannlm.models.accounting import count_parameters, flops_per_token
from psannlm.models.artifact import load_model, save_model
from psannlm.models.positions import sinusoids
from psannlm.models.registry import build_model
from psannlm.models.transformer import Transformer
from psannlm.training.optim import group_parameters

Build = Callable[..., Transformer]

VARIANTS: dict[str, dict[str, Any]] = {
    "silu": {"mlp": "silu"},
    "tanh": {"mlp": "tanh"},
    "tanhglu": {"mlp": "tanhglu"},
    "sigmoid": {"mlp": "sigmoid"},
    "sigmoidglu": {"mlp": "sigmoidglu"},
    "clampedsine": {"mlp": "clampedsine"},
    "clampedsineglu": {"mlp": "clampedsineglu", "sine_params": {"learnable": ["frequency"]}},
    "gelusine": {"mlp": "gelusine"},
    "sinerelu2": {"mlp": "sinerelu2"},
    "phase of sine": {"mlp": "sine", "sine_phase": 0.8},
    "phase of sineglu": {"mlp": "sineglu", "sine_phase": 0.8},
    "phase of gelusine": {"mlp": "gelusine", "sine_phase": 0.8},
    "phase of sinerelu2": {"mlp": "sinerelu2", "sine_phase": 0.8},
    "quadrature of sine": {"mlp": "sine", "sine_quadrature": True},
    "quadrature of sineglu": {"mlp": "sineglu", "sine_quadrature": True},
    "quadrature of an odd width": {"mlp": "sineglu", "sine_quadrature": True, "d_mlp": 15, "activation_gains": True},
    "norm of swiglu's gate": {"mlp": "swiglu", "activation_norm": True},
    "norm of a sine": {"mlp": "sine", "activation_norm": True, "activation_gains": True},
    "norm of an embedding": {"embedding_norm": True, "positional_encoding": "sinusoidal"},
    "fan": {"qkv_features": "fan", "n_kv_heads": 1, "d_model": 18, "n_heads": 3},
    "linear fan": {"qkv_features": "fan_linear"},
    "control of fan": {"qkv_features": "gelu"},
    "gains of swiglu": {"mlp": "swiglu", "activation_gains": True},
    "gains of gelu": {"mlp": "gelu", "activation_gains": True},
    "gains of relu2": {"mlp": "relu2", "activation_gains": True},
    "gains of sineglu": {"mlp": "sineglu", "activation_gains": True},
    "gains of sinerelu2": {"mlp": "sinerelu2", "activation_gains": True},
}
# All keys at once, as far as they go together.
TOGETHER: list[dict[str, Any]] = [
    {"mlp": "gelusine", "sine_phase": 0.8, "activation_gains": True, "activation_norm": True, "qkv_features": "fan"},
    {"mlp": "sineglu", "sine_quadrature": True, "activation_gains": True, "embedding_norm": True},
    {"mlp": "clampedsineglu", "sine_phase": 0.8, "qkv_features": "gelu"},
]
IDS = torch.randint(0, 17, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest, build_tiny: Build) -> Transformer:
    return build_tiny(**{"base": "transformer", **VARIANTS[request.param]})


@torch.no_grad()
def logits(model: Transformer) -> Tensor:
    return model.logits(model.hidden_states(IDS)).float()


@pytest.mark.parametrize("positions", ["rope", "sinusoidal"])
def test_embedding_norm_matches_its_formula(positions: PositionKind) -> None:
    config = ModelConfig(
        base="transformer",
        d_model=6,
        n_heads=1,
        n_layers=1,
        vocab_size=17,
        norm_eps=1e-3,
        embedding_norm=True,
        positional_encoding=positions,
    )
    model = build_model(config, seed=0)
    assert model.embedding_norm is not None
    with torch.no_grad():
        model.embedding_norm.weight.uniform_(0.5, 2.0)
        model.embedding.weight.mul_(3.0)
    weight, table = (
        p.detach().double().requires_grad_() for p in (model.embedding_norm.weight, model.embedding.weight)
    )
    # The branches of a new model are zero: what is left are the norms of the embedding and of the end.
    x = table[IDS]
    if positions == "sinusoidal":
        x = x + 0.02 * sinusoids(torch.arange(IDS.shape[1]), 6).double()
    normed = weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    expected = normed / (normed.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    found = model.hidden_states(IDS)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
    factors = torch.cos(torch.arange(found.numel())).view(found.shape)
    gradients = torch.autograd.grad((found * factors).sum(), (model.embedding_norm.weight, model.embedding.weight))
    exact = torch.autograd.grad((expected * factors).sum(), (weight, table))
    for gradient, wanted in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient, wanted.float(), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_variant_decodes_with_a_cache_as_without(model: Transformer) -> None:
    whole = model(IDS)
    start, cache = model(IDS[:, :9], use_cache=True)
    steps = [start]
    for at in range(9, 20):
        step, cache = model(IDS[:, at : at + 1], past_kvs=cache, use_cache=True)
        steps.append(step)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_variant_file_gives_the_same_model(model: Transformer, tmp_path: Path) -> None:
    save_model(tmp_path / "m", model, None)
    loaded = load_model(tmp_path / "m").model
    assert loaded.config == model.config
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_variant_prepared_for_inference_computes_the_same(model: Transformer, is_compiled: bool) -> None:
    expected = logits(model)
    prepared = prepare_for_inference(model, "float32", is_compiled=is_compiled)
    torch.testing.assert_close(logits(prepared), expected, rtol=0, atol=1e-4)
    narrow = logits(prepare_for_inference(model, "int8", is_compiled=is_compiled))
    assert (narrow - expected).norm() < 0.1 * expected.norm()


def test_variant_counts_equal_the_parameters(model: Transformer) -> None:
    assert sum(count_parameters(model.config).values()) == sum(p.numel() for p in model.parameters())
    # Six operations for each element of a matrix that tokens are multiplied by, and attention's 12 L D T.
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and name != "embedding.weight")
    assert flops_per_token(model.config, 8) == 6 * matrices + 12 * 2 * model.config.d_model * 8


def test_variant_learns_in_every_parameter(model: Transformer) -> None:
    model.train()(IDS, IDS).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    # Only matrices are decayed.
    assert all(p.ndim < 2 for p in group_parameters(model).undecayed.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("settings", TOGETHER, ids=lambda s: str(s["mlp"]))
def test_variant_compiled_training_matches_uncompiled(settings: dict[str, Any], build_tiny: Build) -> None:
    model = build_tiny(base="transformer", **settings).train()
    plain, fused = (
        torch.autograd.grad(function(IDS, IDS), list(model.parameters())) for function in (model, compiled(model))
    )
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("settings", TOGETHER, ids=lambda s: str(s["mlp"]))
def test_variant_compiled_decoding_matches_uncompiled(settings: dict[str, Any], build_tiny: Build) -> None:
    model = build_tiny(base="transformer", **settings)
    logits = []
    for is_compiled in (False, True):
        engine = Engine(model, dtype="float32", compile=is_compiled)
        prefilled, cache = engine.prefill(IDS[:, :8].tolist(), 8)
        logits.append(torch.stack([prefilled, *(engine.decode(IDS[:, at], cache) for at in range(8, 11))]))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[0].transpose(0, 1), model(IDS)[:, 7:11].detach(), rtol=1e-4, atol=1e-4)


def test_variant_trains_alike_with_activation_checkpointing(model: Transformer) -> None:
    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model(IDS, IDS), list(model.parameters())))

    plain = gradients()
    model.train().grad_checkpoint = True
    torch.testing.assert_close(gradients(), plain, rtol=1e-6, atol=1e-6)

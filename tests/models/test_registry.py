"""Bases as sets of defaults, resolution of a configuration, and seeded initial weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from psannlm.config.model import BaseName, ModelConfig
from psannlm.errors import ConfigError
from psannlm.models.activations import SineActivation
from psannlm.models.artifact import load_model, save_model
from psannlm.models.mlp import GatedMlp, Mlp
from psannlm.models.registry import BASES, build_model, resolve

TINY: dict[str, Any] = {"d_model": 8, "n_layers": 2, "n_heads": 2, "vocab_size": 11}


def test_resolve_base_defaults() -> None:
    assert set(BASES) == set(get_args(BaseName))
    wanted = {
        "respsann": ("sine", False, True, 32),
        "waveresnet": ("sineglu", True, False, 64),
        "transformer": ("swiglu", False, False, 64),
    }
    for base, (mlp, conv, scale, d_mlp) in wanted.items():
        found = resolve(ModelConfig(base=base, **TINY))
        assert (found.mlp, found.short_conv.enabled, found.residual_scale, found.d_mlp) == (mlp, conv, scale, d_mlp)
        assert found.n_kv_heads == 2


@pytest.mark.parametrize("base", get_args(BaseName))
@pytest.mark.parametrize("key", ["mlp", "d_mlp", "n_kv_heads", "residual_scale", "short_conv", "max_seq_len"])
def test_resolve_overrides_win(base: BaseName, key: str) -> None:
    silent = resolve(ModelConfig(base=base, **TINY), max_seq_len=64)
    values: dict[str, Any] = {
        "mlp": "gelu",
        "d_mlp": 20,
        "n_kv_heads": 1,
        "residual_scale": not silent.residual_scale,
        "short_conv": {"enabled": not silent.short_conv.enabled},
        "max_seq_len": 7,
    }
    loud = resolve(ModelConfig(base=base, **{**TINY, key: values[key]}), max_seq_len=64)
    found = loud.short_conv.enabled if key == "short_conv" else getattr(loud, key)
    assert found == (values[key]["enabled"] if key == "short_conv" else values[key])
    assert found != (silent.short_conv.enabled if key == "short_conv" else getattr(silent, key))


def test_resolve_base_can_imitate_another() -> None:
    like_waveresnet = {"mlp": "sineglu", "short_conv": {"enabled": True}, "residual_scale": False}
    one, other = ModelConfig(base="transformer", **TINY, **like_waveresnet), ModelConfig(base="waveresnet", **TINY)
    state, wanted = (build_model(resolve(config), seed=3).state_dict() for config in (one, other))
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in state)


@pytest.mark.parametrize("enabled", [None, False])
def test_short_conv_without_places_is_off_and_saves(enabled: bool | None, tmp_path: Path) -> None:
    found = resolve(ModelConfig(**TINY, short_conv={"enabled": enabled, "places": ()}))
    assert found.short_conv.enabled is False
    save_model(tmp_path / "m", build_model(found, seed=0), None)
    assert load_model(tmp_path / "m").model.config == found


def test_resolve_taps_beyond_context_raise() -> None:
    fits = {**TINY, "n_layers": 3, "short_conv": {"dilation_growth": 4}}
    assert resolve(ModelConfig(**fits), max_seq_len=16).short_conv.dilation_growth == 4
    with pytest.raises(ConfigError, match=r"dilation_growth.*4 \*\* 2.*context of 15"):
        resolve(ModelConfig(**fits), max_seq_len=15)
    huge = {"dilation_growth": 2**62}
    with pytest.raises(ConfigError, match="dilation_growth"):
        resolve(ModelConfig(**{**TINY, "n_layers": 2**62}, short_conv=huge, max_seq_len=2**62))
    assert resolve(ModelConfig(base="transformer", **TINY, short_conv=huge), max_seq_len=8).short_conv.enabled is False


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mlp": "swiglu", "sine_phase": 0.5}, "sine_phase: has no effect with mlp: swiglu; set mlp to one of "),
        ({"base": "transformer", "sine_phase": 0.0}, "sine_phase: has no effect with mlp: swiglu"),
        ({"mlp": "gelu", "sine_quadrature": True}, "sine_quadrature: has no effect with mlp: gelu"),
        ({"mlp": "clampedsine", "sine_quadrature": True}, "set mlp to one of sine, sineglu, or drop it"),
        ({"mlp": "sine", "sine_quadrature": True, "sine_phase": 0.5}, "already add up to any phase"),
        ({"activation_norm": True, "gate_init_scale": 0.4}, "gate_init_scale: has no effect with activation_norm"),
        ({"qkv_features": "fan", "d_model": 2, "n_heads": 1}, "needs a d_model of 4 or more"),
        ({"mlp": "sinerelu2", "d_mlp": 1}, "1 feature has no two halves"),
    ],
)
def test_keys_without_effect_are_refused_by_name(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        resolve(ModelConfig(**{**TINY, **settings}))


def test_resolve_is_idempotent() -> None:
    once = resolve(ModelConfig(**{**TINY, "vocab_size": None}), vocab_size=300, max_seq_len=32)
    assert (once.vocab_size, once.max_seq_len) == (300, 32)
    assert resolve(once) == once
    assert resolve(once, vocab_size=200, max_seq_len=64) == once


def test_resolve_without_vocabulary_raises() -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        resolve(ModelConfig())


def test_resolve_too_small_vocabulary_raises() -> None:
    with pytest.raises(ConfigError, match=r"100 .* 300"):
        resolve(ModelConfig(vocab_size=100), vocab_size=300)
    assert resolve(ModelConfig(vocab_size=320), vocab_size=300).vocab_size == 320


def test_build_model_parts_follow_config() -> None:
    blocks = {base: build_model(resolve(ModelConfig(base=base, **TINY))).blocks[1] for base in get_args(BaseName)}
    assert isinstance(blocks["respsann"].mlp, Mlp)
    assert isinstance(blocks["respsann"].mlp.activation, SineActivation)
    assert isinstance(blocks["waveresnet"].mlp, GatedMlp)
    assert isinstance(blocks["waveresnet"].mlp.activation, SineActivation)
    for base, block in blocks.items():
        assert (block.attention_conv is not None) == (block.mlp_conv is not None) == (base == "waveresnet")
        assert (block.attention_scale is not None) == (block.mlp_scale is not None) == (base == "respsann")
    assert not any(isinstance(module, SineActivation) for module in blocks["transformer"].modules())
    placed = ModelConfig(
        base="transformer", short_conv={"enabled": True, "places": ("mlp",), "dilation_growth": 3}, **TINY
    )
    block = build_model(resolve(placed)).blocks[1]
    assert block.attention_conv is None
    assert block.mlp_conv.dilation == 3


@pytest.mark.parametrize(("mlp", "matrix"), [("swiglu", "gate_proj"), ("sine", "up_proj")])
def test_gate_init_scale_scales_the_matrix_before_the_activation(mlp: str, matrix: str) -> None:
    settings: dict[str, Any] = {**TINY, "mlp": mlp, "sine_params": {"freq_std": 0.1}}
    plain = build_model(resolve(ModelConfig(**settings)), seed=3).state_dict()
    scaled = build_model(resolve(ModelConfig(**settings, gate_init_scale=0.25)), seed=3).state_dict()
    for name, weight in plain.items():
        assert torch.equal(scaled[name], weight * (0.25 if f"mlp.{matrix}.weight" in name else 1.0)), name


def test_build_model_weights_depend_on_seed_alone() -> None:
    config = resolve(ModelConfig(sine_params={"freq_std": 0.1}, **TINY))
    torch.manual_seed(1)
    one = build_model(config, seed=5).state_dict()
    torch.manual_seed(2)
    other = build_model(config, seed=5).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    different = build_model(config, seed=6).state_dict()
    for name in ("embedding.weight", "blocks.0.attention.q_proj.weight", "blocks.0.mlp.activation.raw_frequency"):
        assert not torch.equal(one[name], different[name])


def test_build_model_with_seed_keeps_global_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seed: int) -> None:
        raise AssertionError("the generators of the GPUs were seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    before = torch.get_rng_state()
    build_model(resolve(ModelConfig(**TINY)), seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_build_model_without_seed_uses_global_generator() -> None:
    config = resolve(ModelConfig(**TINY))
    torch.manual_seed(1)
    one, other = (build_model(config).embedding.weight for _ in range(2))
    assert not torch.equal(one, other)
    torch.manual_seed(1)
    assert torch.equal(build_model(config).embedding.weight, one)


@pytest.mark.slow
def test_build_model_meta_allocates_nothing() -> None:
    huge = ModelConfig(d_model=8192, n_layers=100, n_heads=64, vocab_size=100_000)
    assert all(p.is_meta for p in build_model(resolve(huge), device="meta").parameters())

"""The mapping to Llama, Qwen3 and Arcee, against the classes of transformers themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from psannlm.config.model import MlpKind, ModelConfig
from psannlm.errors import ConfigError
from psannlm.export.plain_mapping import our_name, plain_config, plain_name, plain_tensors, why_not_plain
from psannlm.models.registry import resolve
from psannlm.models.transformer import Transformer

Build = Callable[..., Transformer]
CLASSES = {
    ("swiglu", False): "LlamaForCausalLM",
    ("geglu", False): "LlamaForCausalLM",
    ("swiglu", True): "Qwen3ForCausalLM",
    ("geglu", True): "Qwen3ForCausalLM",
    ("relu2", False): "ArceeForCausalLM",
    ("gelu", False): "ArceeForCausalLM",
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"tie_embeddings": True},
    {"n_heads": 4, "n_kv_heads": 2},
    {"residual_scale": True},
    {"rope_theta": 50.0, "norm_eps": 0.01},
]


def transformers_model(model: Transformer) -> Any:
    """Return the model of transformers that the mapping describes, through JSON as in a folder."""
    transformers = pytest.importorskip("transformers")
    fields = json.loads(json.dumps(plain_config(model.config)))
    config = transformers.AutoConfig.for_model(**fields)
    (architecture,) = fields["architectures"]
    theirs = getattr(transformers, architecture)(config).eval()
    result = theirs.load_state_dict(dict(plain_tensors(model.state_dict())), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == (["lm_head.weight"] if model.config.tie_embeddings else [])
    return theirs


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("mlp", "qk_norm"), CLASSES)
@torch.no_grad()
def test_mapped_model_has_logits_of_ours(build_tiny: Build, mlp: str, qk_norm: bool, options: dict[str, Any]) -> None:
    model = build_tiny(**{"base": "transformer", "d_model": 16, "mlp": mlp, "qk_norm": qk_norm, **options})
    theirs = transformers_model(model)
    assert type(theirs).__name__ == CLASSES[mlp, qk_norm]
    ids = torch.randint(0, 17, (2, 30), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits
    assert float((model(ids) - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("options", [*OPTIONS, {"qk_norm": True}], ids=str)
def test_plain_names_return_to_ours(build_tiny: Build, options: dict[str, Any]) -> None:
    names = list(build_tiny(**{"base": "transformer", "d_model": 16, **options}).state_dict())
    theirs = {plain_name(name): name for name in names}
    assert {name: our_name(name) for name in theirs if name is not None} == {n: o for n, o in theirs.items() if n}
    assert len(theirs) == len(names) - (3 if options.get("residual_scale") else 0)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.07.mlp.up_proj.weight",
        "model.layers.-1.mlp.up_proj.weight",
        "model.layers.x.mlp.up_proj.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "xmodel.layers.0.mlp.up_proj.weight",
        "model.embed_positions.weight",
        "",
    ],
)
def test_foreign_names_have_no_parameter(name: str) -> None:
    assert our_name(name) is None


def test_tensors_without_scales_are_the_same_bits(build_tiny: Build) -> None:
    state = build_tiny(base="transformer").bfloat16().state_dict()
    for name, tensor in plain_tensors(state):
        ours = our_name(name)
        assert ours is not None
        assert tensor.data_ptr() == state[ours].data_ptr()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"positional_encoding": "alibi"}, "positional_encoding: alibi"),
        ({"positional_encoding": "sinusoidal"}, "positional_encoding: sinusoidal"),
        ({"short_conv": {"enabled": True}}, "short convolutions"),
        ({"mlp": "sine"}, "sine activation"),
        ({"mlp": "sineglu"}, "sine activation"),
        ({"activation_gains": True}, "activation_gains"),
        ({"qkv_features": "fan"}, "qkv_features"),
        ({"activation_norm": True}, "activation_norm"),
        ({"embedding_norm": True}, "embedding_norm"),
        ({"mlp": "relu2", "qk_norm": True}, "qk_norm"),
        ({"mlp": "gelu", "qk_norm": True}, "qk_norm"),
    ],
    ids=str,
)
def test_unmapped_settings_are_refused_by_name(settings: dict[str, Any], said: str) -> None:
    config = resolve(ModelConfig(base="transformer", d_model=12, n_heads=2, vocab_size=17, max_seq_len=8, **settings))
    with pytest.raises(ConfigError, match=said):
        plain_config(config)


def test_every_feed_forward_is_mapped_or_refused() -> None:
    for mlp in get_args(MlpKind):
        config = resolve(ModelConfig(base="transformer", mlp=mlp, vocab_size=17, max_seq_len=8))
        assert (why_not_plain(config) is None) == ((mlp, False) in CLASSES)


def test_config_without_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_seq_len"):
        plain_config(resolve(ModelConfig(base="transformer", vocab_size=17)))


@torch.no_grad()
def test_rope_theta_and_norm_eps_hold_while_decoding(build_tiny: Build) -> None:
    model = build_tiny(base="transformer", d_model=16, qk_norm=True, rope_theta=50.0, norm_eps=0.01)
    ids = torch.randint(0, 17, (2, 20), generator=torch.Generator().manual_seed(0))
    _, cache = model(ids[:, :10], use_cache=True)
    decoded, _ = model(ids[:, 10:], past_kvs=cache, use_cache=True)
    expected = transformers_model(model)(ids).logits[:, 10:]
    assert float((decoded - expected).abs().max() / expected.abs().max()) < 1e-5

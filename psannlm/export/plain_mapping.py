"""Mapping between the plain transformer and the Llama, Qwen3 and Arcee classes of Hugging Face transformers.

A model whose blocks hold nothing but rope attention and a common feed-forward computes what one of these classes does:
the same products in the same order, up to rounding. The tables here are the only place that knows their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from psannlm.config.model import MlpKind, ModelConfig
from psannlm.errors import ConfigError

Architecture = Literal["LlamaForCausalLM", "Qwen3ForCausalLM", "ArceeForCausalLM"]


@dataclass(frozen=True)
class PlainClass:
    """A class of transformers, its ``model_type``, and its name for the activation of our feed-forward."""

    architecture: Architecture
    model_type: str
    hidden_act: str


# (feed-forward, QK-norm) -> class. transformers has no class with an ungated feed-forward and QK-norm.
_CLASSES: dict[tuple[MlpKind, bool], PlainClass] = {
    ("swiglu", False): PlainClass("LlamaForCausalLM", "llama", "silu"),
    ("geglu", False): PlainClass("LlamaForCausalLM", "llama", "gelu"),
    ("swiglu", True): PlainClass("Qwen3ForCausalLM", "qwen3", "silu"),
    ("geglu", True): PlainClass("Qwen3ForCausalLM", "qwen3", "gelu"),
    ("relu2", False): PlainClass("ArceeForCausalLM", "arcee", "relu2"),
    ("gelu", False): PlainClass("ArceeForCausalLM", "arcee", "gelu"),
}
_TOP_NAMES = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
_BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.out_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
_OUR_TOP_NAMES = {theirs: ours for ours, theirs in _TOP_NAMES.items()}
_OUR_BLOCK_NAMES = {theirs: ours for ours, theirs in _BLOCK_NAMES.items()}
# Scalar of a residual branch -> the last matrix of that branch, into which it is folded.
_FOLDED = {"attention_scale": "attention.out_proj", "mlp_scale": "mlp.down_proj"}


def why_not_plain(config: ModelConfig) -> str | None:
    """Return which setting of a resolved ``config`` no class of transformers computes, or None where one does."""
    if config.positional_encoding != "rope":
        return f"model.positional_encoding: {config.positional_encoding}"
    if config.short_conv.enabled:
        return "the short convolutions (model.short_conv)"
    if config.activation_gains:
        return "gains of the activation (model.activation_gains)"
    for key in ("activation_norm", "embedding_norm", "qkv_features"):
        if getattr(config, key):
            return f"model.{key}"
    if config.mlp in ("sine", "sineglu"):
        return f"the sine activation (model.mlp: {config.mlp})"
    if (config.mlp, config.qk_norm) not in _CLASSES:
        with_norm = "model.qk_norm with " if config.qk_norm else ""
        return f"{with_norm}the feed-forward {config.mlp}"
    return None


def plain_class(config: ModelConfig) -> PlainClass:
    """Return the class of transformers that computes exactly what a model of the resolved ``config`` computes.

    Raises:
        ConfigError: there is none; :func:`why_not_plain` returns why.
    """
    if (reason := why_not_plain(config)) is not None:
        raise ConfigError(f"no model class of transformers has {reason}")
    assert config.mlp is not None
    return _CLASSES[config.mlp, config.qk_norm]


def feed_forward_of(architecture: str, hidden_act: str) -> MlpKind | None:
    """Return our feed-forward that a class computes with ``hidden_act``, or None where we have none."""
    for (mlp, _), known in _CLASSES.items():
        if (known.architecture, known.hidden_act) == (architecture, hidden_act):
            return mlp
    return None


def plain_config(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return the fields of ``config.json`` that describe the network of a resolved ``config``; token ids are not set.

    Raises:
        ConfigError: no class of transformers computes it, or it has no maximum context.
    """
    known = plain_class(config)
    if config.max_seq_len is None:
        raise ConfigError("model.max_seq_len: is null, and config.json needs the maximum context; set it")
    fields: dict[str, Any] = {
        "architectures": [known.architecture],
        "model_type": known.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_model // config.n_heads,
        "hidden_act": known.hidden_act,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": str(dtype).removeprefix("torch."),
    }
    # Qwen3 has no mlp_bias; Llama and Arcee have no sliding window.
    fields |= {"use_sliding_window": False} if known.model_type == "qwen3" else {"mlp_bias": False}
    return fields


def plain_name(name: str) -> str | None:
    """Return the name in transformers of our parameter ``name``, or None of a scale, which is folded into a matrix.

    Raises:
        KeyError: the plain transformer has no such parameter.
    """
    if not name.startswith("blocks."):
        module, _, kind = name.rpartition(".")
        return f"{_TOP_NAMES[module]}.{kind}"
    _, index, rest = name.split(".", 2)
    if rest in _FOLDED:
        return None
    module, _, kind = rest.rpartition(".")
    return f"model.layers.{index}.{_BLOCK_NAMES[module]}.{kind}"


def our_name(name: str) -> str | None:
    """Return our name of the parameter ``name`` of transformers, or None where the plain transformer has none."""
    module, _, kind = name.rpartition(".")
    if kind != "weight":
        return None
    if module in _OUR_TOP_NAMES:
        return f"{_OUR_TOP_NAMES[module]}.weight"
    prefix, layers, rest = module.partition("model.layers.")
    index, _, part = rest.partition(".")
    if prefix or not layers or part not in _OUR_BLOCK_NAMES or not (index.isascii() and index.isdecimal()):
        return None
    # Written as a number is: 07 would name the same block as 7.
    return f"blocks.{index}.{_OUR_BLOCK_NAMES[part]}.weight" if str(int(index)) == index else None


def plain_tensors(state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the name in transformers and the tensor of each parameter in our ``state``, one at a time.

    Residual scales are folded: x + α·(W h) is x + (α·W) h, so that the last matrix of a branch is multiplied by α, in
    float32. A model without them is passed on bit for bit, and so is one of which every α is 1.

    Args:
        state: the state dict of a model for which :func:`why_not_plain` returns None.
        dtype: to convert to; None keeps that of each tensor.
    """
    scales = {
        f"{prefix}.{_FOLDED[last]}.weight": tensor
        for name, tensor in state.items()
        for prefix, _, last in [name.rpartition(".")]
        if last in _FOLDED
    }
    for name, tensor in state.items():
        theirs = plain_name(name)
        if theirs is None:
            continue
        wanted = dtype or tensor.dtype
        if name in scales:
            tensor = tensor.float() * scales[name].float()
        yield theirs, tensor.to(wanted)

"""Mapping between a model and the ``PsannLMForCausalLM`` class, which expresses every configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from psannlm.config.model import BaseName, ModelConfig, ShortConvConfig, SineConfig
from psannlm.models.activations import is_activation_parameter
from psannlm.models.mlp import KINDS

ARCHITECTURE = "PsannLMForCausalLM"
MODEL_TYPE = "psannlm"
# The two flat files of an exported folder, copied from this package.
CODE_FILES = ("configuration_psannlm.py", "modeling_psannlm.py")
_AUTO_MAP = {
    "AutoConfig": "configuration_psannlm.PsannLMConfig",
    "AutoModel": "modeling_psannlm.PsannLMModel",
    "AutoModelForCausalLM": "modeling_psannlm.PsannLMForCausalLM",
}
# Keys of the same name in both, which folders that were exported before them lack.
_LATER_KEYS = ("activation_gains", "sine_phase", "sine_quadrature", "activation_norm", "embedding_norm", "qkv_features")
_BOUNDS = {"amplitude": "amp_bounds", "frequency": "freq_bounds", "decay": "damp_bounds"}
_TOP_NAMES = {
    "embedding": "model.embed_tokens",
    "embedding_norm": "model.embed_norm",
    "final_norm": "model.norm",
    "head": "lm_head",
}
_PARTS = {
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "out_proj": "o_proj",
    "mlp_norm": "post_attention_layernorm",
}
_OUR_TOP_NAMES = {theirs: ours for ours, theirs in _TOP_NAMES.items()}
_OUR_PARTS = {theirs: ours for ours, theirs in _PARTS.items()}


def custom_config(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return the fields of ``config.json`` that describe the network of a resolved ``config``; token ids are not set.

    Initial values (those of the sine, ``gate_init_scale``) are not among them: they have no effect on a trained model.
    """
    assert config.mlp is not None
    sine = config.sine_params
    return {
        "architectures": [ARCHITECTURE],
        "auto_map": dict(_AUTO_MAP),
        "model_type": MODEL_TYPE,
        "psannlm_base": config.base,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_model // config.n_heads,
        "hidden_act": KINDS[config.mlp].activation,
        "is_gated_mlp": KINDS[config.mlp].is_gated,
        "activation_gains": config.activation_gains,
        "sine_phase": config.sine_phase,
        "sine_quadrature": config.sine_quadrature,
        "activation_norm": config.activation_norm,
        "embedding_norm": config.embedding_norm,
        "qkv_features": config.qkv_features,
        "position_encoding": config.positional_encoding,
        "rotary_base": config.rope_theta,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "qk_norm": config.qk_norm,
        "residual_scale": bool(config.residual_scale),
        "short_conv_places": list(config.short_conv.places) if config.short_conv.enabled else [],
        "short_conv_kernel_size": config.short_conv.kernel_size,
        "short_conv_dilation_growth": config.short_conv.dilation_growth,
        "short_conv_activation": config.short_conv.activation,
        "sine_decay_mode": sine.decay_mode,
        "sine_bounds": {name: _as_list(getattr(sine, key)) for name, key in _BOUNDS.items()},
        "sine_learnable": list(sine.learnable_parameters()),
        "dropout": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _as_list(bounds: tuple[float, float] | None) -> list[float] | None:
    return None if bounds is None else list(bounds)


def model_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration that the ``config.json`` of an exported folder describes: undoes :func:`custom_config`.

    Raises:
        ValidationError: a field has a wrong type or is out of range.
        KeyError: a field is missing, or its value is unknown.
    """
    mlp = {(kind.activation, kind.is_gated): name for name, kind in KINDS.items()}
    base: BaseName = fields["psannlm_base"]
    places = fields["short_conv_places"]
    bounds = {key: fields["sine_bounds"][name] for name, key in _BOUNDS.items()}
    # A starting value outside its bounds is refused, and the one of the training run is not in the file.
    starts = {
        key.replace("bounds", "init"): sum(pair) / 2
        for key, pair in bounds.items()
        if pair is not None and not pair[0] <= SineConfig.model_fields[key.replace("bounds", "init")].default <= pair[1]
    }
    return ModelConfig.model_validate(
        {
            "base": base,
            "d_model": fields["hidden_size"],
            "n_layers": fields["num_hidden_layers"],
            "n_heads": fields["num_attention_heads"],
            "n_kv_heads": fields["num_key_value_heads"],
            "d_mlp": fields["intermediate_size"],
            "mlp": mlp[fields["hidden_act"], bool(fields["is_gated_mlp"])],
            **{key: fields[key] for key in _LATER_KEYS if key in fields},
            "vocab_size": fields["vocab_size"],
            "max_seq_len": fields["max_position_embeddings"],
            "positional_encoding": fields["position_encoding"],
            "rope_theta": fields["rotary_base"],
            "norm_eps": fields["rms_norm_eps"],
            "qk_norm": fields["qk_norm"],
            "residual_scale": fields["residual_scale"],
            "dropout": fields["dropout"],
            "tie_embeddings": fields["tie_word_embeddings"],
            "sine_params": {
                "decay_mode": fields["sine_decay_mode"],
                "learnable": fields["sine_learnable"],
                **bounds,
                **starts,
            },
            "short_conv": {
                "enabled": bool(places),
                "places": places or ShortConvConfig.model_fields["places"].default,
                "kernel_size": fields["short_conv_kernel_size"],
                "dilation_growth": fields["short_conv_dilation_growth"],
                "activation": fields["short_conv_activation"],
            },
        }
    )


def custom_name(name: str) -> str:
    """Return the name in ``PsannLMForCausalLM`` of our parameter or buffer ``name``."""
    if not name.startswith("blocks."):
        module, _, kind = name.rpartition(".")
        return f"{_TOP_NAMES[module]}.{kind}"
    _, index, *parts = name.split(".")
    return ".".join(["model", "layers", index, *(_PARTS.get(part, part) for part in parts)])


def our_name(name: str) -> str | None:
    """Return our name of the parameter ``name`` of ``PsannLMForCausalLM``, or None where it can have none."""
    module, _, kind = name.rpartition(".")
    if module in _OUR_TOP_NAMES:
        return f"{_OUR_TOP_NAMES[module]}.{kind}"
    parts = name.split(".")
    if parts[:2] != ["model", "layers"]:
        return None
    return ".".join(["blocks", parts[2], *(_OUR_PARTS.get(part, part) for part in parts[3:])])


def custom_tensors(state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the name in ``PsannLMForCausalLM`` and the tensor of each entry of our ``state``, one at a time.

    Args:
        state: the state dict of a model.
        dtype: to convert to; None keeps that of each tensor. Parameters of the sine stay float32 in any case.
    """
    for name, tensor in state.items():
        wanted = tensor.dtype if dtype is None else dtype
        yield custom_name(name), tensor.to(torch.float32 if is_activation_parameter(name) else wanted)

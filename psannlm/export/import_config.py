"""Reading of a ``config.json`` of Llama, Qwen3 or Arcee as our configuration; what ours cannot express is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from psannlm.config.model import ModelConfig
from psannlm.config.run import section_from_kwargs
from psannlm.errors import ConfigError, Problem
from psannlm.export.plain_mapping import feed_forward_of

# Our key -> theirs.
_SIZES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_mlp": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "rope_theta": "rope_parameters.rope_theta",
}
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
# Keys of the two forms of rope settings: transformers 5 has rope_parameters, older versions rope_scaling.
_ROPE_KEYS = ("rope_parameters", "rope_scaling")
_ROPE_FIELDS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


@dataclass(frozen=True)
class _Class:
    """What a class of transformers assumes for keys that are absent from ``config.json``."""

    model_type: str
    defaults: Mapping[str, Any]
    qk_norm: bool = False


_COMMON = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
_CLASSES = {
    "LlamaForCausalLM": _Class("llama", {**_COMMON, "max_position_embeddings": 2048}),
    "Qwen3ForCausalLM": _Class(
        "qwen3",
        {**_COMMON, "max_position_embeddings": 32768, "head_dim": 128, "num_key_value_heads": 32},
        qk_norm=True,
    ),
    "ArceeForCausalLM": _Class(
        "arcee", {**_COMMON, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "relu2"}
    ),
}
NATIVE_CLASSES = tuple(_CLASSES)


def architecture_of(fields: Mapping[str, Any]) -> str:
    """Return the model class that a ``config.json`` names.

    Raises:
        ConfigError: it names none, or several.
    """
    named = fields.get("architectures")
    if named is None:
        for architecture, known in _CLASSES.items():
            if fields.get("model_type") == known.model_type:
                return architecture
    if isinstance(named, list) and len(named) == 1 and isinstance(named[0], str):
        return named[0]
    raise ConfigError(
        Problem("architectures", f"{_shown(named)} does not name one model class; one of {', '.join(_CLASSES)} is read")
    )


def native_model_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Return our configuration of the network that a ``config.json`` describes.

    Raises:
        ConfigError: with every setting that our model cannot express, by its name in the file.
    """
    architecture = architecture_of(fields)
    known = _CLASSES.get(architecture)
    if known is None:
        message = f"{architecture:.80} is not a class that can be imported; these can: {', '.join(_CLASSES)}"
        raise ConfigError(Problem("architectures", message))
    given = {**known.defaults, **{key: value for key, value in fields.items() if value is not None}}
    problems = [Problem(key, "is missing") for key in _REQUIRED if key not in given]
    problems += _inexpressible(given, architecture)
    theta, rope_problems = _rope(given)
    problems += rope_problems
    mlp = feed_forward_of(architecture, str(given["hidden_act"]))
    if mlp is None:
        message = f"{_shown(given['hidden_act'])} is not an activation that our feed-forward of {architecture} has"
        problems.append(Problem("hidden_act", message))
    if problems:
        raise ConfigError(problems)
    sizes = {ours: given[theirs] for ours, theirs in _SIZES.items() if theirs in given}
    try:
        return section_from_kwargs(
            ModelConfig,
            "model",
            {
                **sizes,
                "base": "transformer",
                "mlp": mlp,
                "rope_theta": theta,
                "qk_norm": known.qk_norm,
                "residual_scale": False,
                "short_conv": {"enabled": False},
            },
        )
    except ConfigError as error:
        raise ConfigError([_by_their_name(problem) for problem in error.problems]) from error


def _inexpressible(given: Mapping[str, Any], architecture: str) -> list[Problem]:
    """Return the settings, those of rope excepted, that change what the model computes and that ours lacks."""
    found = [
        Problem(key, f"{_shown(given[key])}; our layers of this kind have no biases")
        for key in ("attention_bias", "mlp_bias")
        if given.get(key)
    ]
    if given.get("use_sliding_window") or any(kind != "full_attention" for kind in given.get("layer_types") or ()):
        found.append(Problem("sliding_window", "our attention sees the whole context in every layer"))
    for key, what in (
        ("quantization_config", "quantized weights are not read; save the model in float32, bfloat16 or float16"),
        ("auto_map", f"the folder has model code of its own, which may compute something else than {architecture}"),
    ):
        if given.get(key):
            found.append(Problem(key, what))
    width, heads = given.get("hidden_size"), given.get("num_attention_heads")
    head_dim = given.get("head_dim")
    if head_dim is not None and isinstance(width, int) and isinstance(heads, int) and head_dim * heads != width:
        message = (
            f"{_shown(head_dim)} features per head; ours have hidden_size / num_attention_heads, {width} / {heads}"
        )
        found.append(Problem("head_dim", message))
    return found


def _rope(given: Mapping[str, Any]) -> tuple[Any, list[Problem]]:
    """Return the base of rope's wavelengths, and the settings of rope that ours lacks."""
    theta, problems = given.get("rope_theta", 10_000.0), []
    if given.get("partial_rotary_factor", 1) != 1:
        problems.append(Problem("partial_rotary_factor", "our rope rotates all features of a head"))
    for key in _ROPE_KEYS:
        settings = given.get(key)
        if settings is None:
            continue
        if not isinstance(settings, Mapping):
            problems.append(Problem(key, f"{_shown(settings)} is not an object"))
            continue
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind != "default":
            problems.append(Problem(f"{key}.rope_type", f"{_shown(kind)}; our rope has no scaling"))
        elif unknown := sorted(str(name) for name in settings if name not in _ROPE_FIELDS):
            problems.append(Problem(f"{key}.{unknown[0]:.80}", "our rope has no such setting"))
        elif settings.get("partial_rotary_factor", 1) != 1:
            problems.append(Problem(f"{key}.partial_rotary_factor", "our rope rotates all features of a head"))
        theta = settings.get("rope_theta", theta)
    return theta, problems


def _by_their_name(problem: Problem) -> Problem:
    ours = problem.path.removeprefix("model.")
    return Problem(_SIZES.get(ours, ours), problem.message)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

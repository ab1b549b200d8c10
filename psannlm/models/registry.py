"""Bases (sets of defaults), resolution of a configuration, and construction of a model from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from psannlm.config.model import BASE_MLP, BaseName, MlpKind, ModelConfig
from psannlm.errors import ConfigError, Problem
from psannlm.io.limits import MAX_CONV_REACH, MAX_DILATION
from psannlm.models.mlp import default_d_mlp
from psannlm.models.transformer import Transformer


@dataclass(frozen=True)
class BaseDefaults:
    """Values of a base for keys that the configuration leaves null."""

    mlp: MlpKind
    short_conv: bool
    residual_scale: bool


BASES: dict[BaseName, BaseDefaults] = {
    "respsann": BaseDefaults(BASE_MLP["respsann"], short_conv=False, residual_scale=True),
    "waveresnet": BaseDefaults(BASE_MLP["waveresnet"], short_conv=True, residual_scale=False),
    "transformer": BaseDefaults(BASE_MLP["transformer"], short_conv=False, residual_scale=False),
}


def resolve(config: ModelConfig, *, vocab_size: int | None = None, max_seq_len: int | None = None) -> ModelConfig:
    """Return ``config`` with every null replaced by the base's default, the vocabulary size or the training window.

    A short convolution without places is switched off, so that the result is a valid configuration.

    Raises:
        ConfigError: no vocabulary size is known, or the given one is smaller than the tokenizer's; or the taps of a
            short convolution are further apart than the context is long, or reach further than ``limits`` allows; or
            the feed-forward is too narrow for its kind.
    """
    defaults = BASES[config.base]
    if config.vocab_size is None and vocab_size is None:
        raise ConfigError(Problem("model.vocab_size", "unknown; set it, or name data to derive it from"))
    if config.vocab_size is not None and vocab_size is not None and config.vocab_size < vocab_size:
        message = f"{config.vocab_size} is less than the tokenizer's {vocab_size} ids; leave it null, or raise it"
        raise ConfigError(Problem("model.vocab_size", message))
    mlp = config.mlp or defaults.mlp
    enabled = (defaults.short_conv if config.short_conv.enabled is None else config.short_conv.enabled) and bool(
        config.short_conv.places
    )
    context = config.max_seq_len or max_seq_len
    if enabled:
        _refuse_unreachable_taps(config, context)
    d_mlp = config.d_mlp or default_d_mlp(mlp, config.d_model, is_quadrature=config.sine_quadrature)
    if mlp == "sinerelu2" and d_mlp < 2:
        message = f"{d_mlp} feature has no two halves for mlp: sinerelu2; set 2 or more"
        raise ConfigError(Problem("model.d_mlp", message))
    return config.model_copy(
        update={
            "mlp": mlp,
            "d_mlp": d_mlp,
            "n_kv_heads": config.n_kv_heads or config.n_heads,
            "vocab_size": config.vocab_size or vocab_size,
            "max_seq_len": context,
            "short_conv": config.short_conv.model_copy(update={"enabled": enabled}),
            "residual_scale": defaults.residual_scale if config.residual_scale is None else config.residual_scale,
        }
    )


def _refuse_unreachable_taps(config: ModelConfig, context: int | None) -> None:
    """Raise ConfigError if a layer's taps are beyond the context: they would read zeros, in unbounded memory.

    Where no context is known, or an absurd one, ``limits.MAX_DILATION`` replaces it.
    """
    growth, last = config.short_conv.dilation_growth, config.n_layers - 1
    longest = MAX_DILATION if context is None else min(context, MAX_DILATION)
    # In logarithms: growth ** n_layers of a hostile file could fill the memory with digits.
    if last * math.log(growth) > math.log(longest):
        of = f"the context of {longest} tokens" if longest == context else f"the limit of {longest:,} positions"
        message = (
            f"{growth} makes the dilation of layer {last} (counted from 0) {growth} ** {last}, more than {of}; lower it"
        )
        raise ConfigError(Problem("model.short_conv.dilation_growth", message))
    reach = (config.short_conv.kernel_size - 1) * growth**last
    if reach > MAX_CONV_REACH:
        message = (
            f"{config.short_conv.kernel_size} taps of layer {last} reach back {reach:,} positions, more than the limit "
        )
        raise ConfigError(Problem("model.short_conv.kernel_size", f"{message}of {MAX_CONV_REACH:,}; lower it"))


def build_model(config: ModelConfig, *, seed: int | None = None, device: torch.device | str = "cpu") -> Transformer:
    """Build the model of ``config``, with initial weights that depend only on ``seed`` where one is given.

    ``config`` is resolved by :func:`resolve` first, which raises ConfigError without a vocabulary size. Weights are
    drawn on the CPU, so that every device starts from the same ones; with a ``seed`` the global random generators are
    not advanced. ``device="meta"`` builds shapes only.
    """
    config = resolve(config)
    if torch.device(device).type == "meta":
        with torch.device("meta"):
            return Transformer(config)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            # Not torch.manual_seed, which seeds every GPU as well.
            torch.default_generator.manual_seed(seed)
        return Transformer(config).to(device)

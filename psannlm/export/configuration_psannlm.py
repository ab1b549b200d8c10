"""Configuration of a psannlm model for transformers: the keys of its ``config.json``.

This file and ``modeling_psannlm.py`` are copied into exported folders and import nothing of psannlm.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class PsannLMConfig(PreTrainedConfig):
    """Pre-norm decoder with damped sine feed-forwards, short causal convolutions and any position encoding of psannlm.

    Attributes:
        hidden_act: ``sine``, ``clampedsine``, ``gelusine``, ``sinerelu2``, ``gelu`` (erf), ``silu``, ``relu2``,
            ``tanh`` or ``sigmoid``; of the gate where ``is_gated_mlp``.
        activation_gains: multiply input and output of the activation by a learned positive gain per feature.
        sine_phase: the sine of a feed-forward has a learned phase per feature, from this start in radians; None: none.
        sine_quadrature: the sine makes a sine and a cosine of each of its inputs, together ``intermediate_size``.
        activation_norm: RMSNorm, without weights, of the input of the activation.
        embedding_norm: RMSNorm of the embedding, positions of ``sinusoidal`` included.
        qkv_features: features from which queries, keys and values are projected: ``fan``, ``fan_linear``, ``gelu`` or
            None, the input itself.
        position_encoding: ``rope``, ``alibi`` or ``sinusoidal``.
        residual_scale: multiply each residual branch by a learned scalar.
        short_conv_places: the sublayers, of ``attention`` and ``mlp``, whose normalized input is convolved over time.
        short_conv_kernel_size: taps, including the current position; layer i has the dilation
            ``short_conv_dilation_growth`` ** i.
        short_conv_activation: ``none`` or ``sine``, of the convolution's output.
        sine_decay_mode: g(z) in A exp(-d g(z)) sin(f z): ``abs``, ``relu`` or ``none``.
        sine_bounds: [lowest, highest] or None for each of ``amplitude``, ``frequency`` and ``decay``.
        sine_learnable: which of the three are trained.
        psannlm_base: the base of psannlm that the model was built from.
    """

    model_type = "psannlm"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012  # as transformers declares it

    vocab_size: int = 4096
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int = 64
    hidden_act: str = "sine"
    is_gated_mlp: bool = True
    activation_gains: bool = False
    sine_phase: float | None = None
    sine_quadrature: bool = False
    activation_norm: bool = False
    embedding_norm: bool = False
    qkv_features: str | None = None
    position_encoding: str = "rope"
    rotary_base: float = 10000.0
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-6
    qk_norm: bool = False
    residual_scale: bool = False
    short_conv_places: list[str] | None = None
    short_conv_kernel_size: int = 4
    short_conv_dilation_growth: int = 1
    short_conv_activation: str = "none"
    sine_decay_mode: str = "abs"
    sine_bounds: dict[str, list[float] | None] | None = None
    sine_learnable: list[str] | None = None
    dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    psannlm_base: str = "waveresnet"
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.short_conv_places = list(self.short_conv_places or [])
        # The stock cache keeps convolution states beside keys and values in layers of the type "hybrid".
        kind = "hybrid" if self.short_conv_places else "full_attention"
        self.layer_types = [kind] * self.num_hidden_layers
        self.number_of_conv_states = len(self.short_conv_places)
        super().__post_init__(**kwargs)


__all__ = ["PsannLMConfig"]

"""psannlm models for transformers: damped sine feed-forwards, short causal convolutions, RoPE, ALiBi or sinusoids.

This file and ``configuration_psannlm.py`` are copied into exported folders and import nothing of psannlm.

Shapes: B batch, T new tokens, S keys, H heads, G key/value heads, K head size, D hidden size, F feed-forward size.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_psannlm import PsannLMConfig

# transformers 5.24 calls the cache `cache`; earlier versions called it `past_key_values`.
_CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
_SINE_PARAMETERS = ("amplitude", "frequency", "decay")
_ADDED_SINE_WEIGHT = 0.1
_SINUSOID_STD = 0.02
_SINUSOID_BASE = 10_000.0


class PsannLMRMSNorm(nn.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class PsannLMSine(nn.Module):
    """A exp(-d g(z)) sin(f z) with A, f and d per feature: softplus of raw parameters, within their bounds.

    Clamped, the angle is limited to ±π/2. With a phase p, sin(f z) is sin(f z + p) - sin p. In quadrature, the same
    with the cosine of each input follows, up to ``size`` features.
    """

    def __init__(
        self,
        config: PsannLMConfig,
        size: int,
        is_clamped: bool = False,
        phase: float | None = None,
        is_quadrature: bool = False,
    ) -> None:
        super().__init__()
        self.size = size
        self.is_clamped = is_clamped
        self.is_quadrature = is_quadrature
        self.phase_start = phase
        self.decay_mode = config.sine_decay_mode
        self.bounds = config.sine_bounds or {}
        self.learnable = _SINE_PARAMETERS if config.sine_learnable is None else tuple(config.sine_learnable)
        for name in _SINE_PARAMETERS:
            n_values = (size + 1) // 2 if is_quadrature and name != "amplitude" else size
            self.register_parameter(f"raw_{name}", nn.Parameter(torch.zeros(n_values)))
        self.phase = None if phase is None else nn.Parameter(torch.zeros(size))

    def _value(self, name: str) -> Tensor:
        raw = getattr(self, f"raw_{name}").float()
        # Loading replaces the parameters, so that requires_grad=False would be lost.
        value = F.softplus(raw if name in self.learnable else raw.detach())
        bounds = self.bounds.get(name)
        return value if bounds is None else value.clamp(*bounds)

    def _sine(self, angle: Tensor) -> Tensor:
        return torch.sin(angle.clamp(-math.pi / 2, math.pi / 2) if self.is_clamped else angle)

    def forward(self, z: Tensor) -> Tensor:
        wide = z.float()
        angle = self._value("frequency") * wide
        if self.phase is None:
            y = self._sine(angle)
        else:
            y = self._sine(angle + self.phase.float()) - self._sine(self.phase.float())
        if self.is_quadrature:
            return (self._value("amplitude") * self._with_cosines(y, angle, wide)).to(z.dtype)
        return self._damped(self._value("amplitude") * y, wide).to(z.dtype)

    def _with_cosines(self, sines: Tensor, angle: Tensor, z: Tensor) -> Tensor:
        both = (self._damped(sines, z), self._damped(torch.cos(angle), z)[..., : self.size // 2])
        return torch.cat(both, dim=-1)

    def _damped(self, y: Tensor, z: Tensor) -> Tensor:
        if self.decay_mode == "none":
            return y
        return y * torch.exp(-self._value("decay") * (z.abs() if self.decay_mode == "abs" else z.clamp(min=0.0)))


class PsannLMGeluSine(nn.Module):
    """GELU(z) + a sin(f z), with a signed weight a and a positive frequency f per feature.

    With a phase p, sin(f z) is sin(f z + p) - sin p.
    """

    def __init__(self, config: PsannLMConfig, size: int) -> None:
        super().__init__()
        self.bounds = (config.sine_bounds or {}).get("frequency")
        self.learnable = _SINE_PARAMETERS if config.sine_learnable is None else tuple(config.sine_learnable)
        self.sine_weight = nn.Parameter(torch.zeros(size))
        self.raw_frequency = nn.Parameter(torch.zeros(size))
        self.phase_start = config.sine_phase
        self.phase = None if config.sine_phase is None else nn.Parameter(torch.zeros(size))

    def forward(self, z: Tensor) -> Tensor:
        # Loading replaces the parameters, so that requires_grad=False would be lost.
        weight = self.sine_weight if "amplitude" in self.learnable else self.sine_weight.detach()
        raw = self.raw_frequency if "frequency" in self.learnable else self.raw_frequency.detach()
        frequency = F.softplus(raw.float())
        if self.bounds is not None:
            frequency = frequency.clamp(*self.bounds)
        wide = z.float()
        angle = frequency * wide
        if self.phase is None:
            sine = torch.sin(angle)
        else:
            sine = torch.sin(angle + self.phase.float()) - torch.sin(self.phase.float())
        return (F.gelu(wide) + weight.float() * sine).to(z.dtype)


class PsannLMGainedActivation(nn.Module):
    """c · act(b z) with positive gains b and c per feature: softplus of raw parameters."""

    def __init__(self, activation: nn.Module, n_inputs: int, size: int) -> None:
        super().__init__()
        self.raw_input_gain = nn.Parameter(torch.zeros(n_inputs))
        self.raw_output_gain = nn.Parameter(torch.zeros(size))
        self.activation = activation

    def forward(self, z: Tensor) -> Tensor:
        y = self.activation(z.float() * F.softplus(self.raw_input_gain.float()))
        return (y * F.softplus(self.raw_output_gain.float())).to(z.dtype)


class PsannLMSquaredReLU(nn.Module):
    """max(z, 0) squared."""

    def forward(self, z: Tensor) -> Tensor:
        return F.relu(z).square()


class PsannLMSineSquaredReLU(nn.Module):
    """The sine on the first half of the features, squared ReLU on the others."""

    def __init__(self, config: PsannLMConfig, size: int) -> None:
        super().__init__()
        self.n_sines = size // 2
        self.sine = PsannLMSine(config, self.n_sines, phase=config.sine_phase)

    def forward(self, z: Tensor) -> Tensor:
        sines, others = self.sine(z[..., : self.n_sines]), F.relu(z[..., self.n_sines :]).square()
        return torch.cat((sines, others), dim=-1)


_ACTIVATIONS: dict[str, Callable[[PsannLMConfig, int], nn.Module]] = {
    "sine": lambda config, size: PsannLMSine(
        config, size, phase=config.sine_phase, is_quadrature=config.sine_quadrature
    ),
    "clampedsine": lambda config, size: PsannLMSine(config, size, is_clamped=True, phase=config.sine_phase),
    "gelusine": PsannLMGeluSine,
    "sinerelu2": PsannLMSineSquaredReLU,
    "gelu": lambda config, size: nn.GELU(),
    "silu": lambda config, size: nn.SiLU(),
    "relu2": lambda config, size: PsannLMSquaredReLU(),
    "tanh": lambda config, size: nn.Tanh(),
    "sigmoid": lambda config, size: nn.Sigmoid(),
}


def _activation(config: PsannLMConfig) -> nn.Module:
    if config.hidden_act not in _ACTIVATIONS:
        raise ValueError(f"hidden_act {config.hidden_act!r} is not one of {', '.join(_ACTIVATIONS)}")
    size = config.intermediate_size
    activation = _ACTIVATIONS[config.hidden_act](config, size)
    return PsannLMGainedActivation(activation, _n_inputs(config), size) if config.activation_gains else activation


def _n_inputs(config: PsannLMConfig) -> int:
    """Return the number of inputs of the activation."""
    return (config.intermediate_size + 1) // 2 if config.sine_quadrature else config.intermediate_size


class PsannLMMLP(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))); the up projection of an ungated sine has a bias."""

    def __init__(self, config: PsannLMConfig) -> None:
        super().__init__()
        self.gate_proj: nn.Module | None = None
        has_bias = config.hidden_act in ("sine", "clampedsine") and not config.is_gated_mlp
        if config.is_gated_mlp:
            self.gate_proj = nn.Linear(config.hidden_size, _n_inputs(config), bias=False)
        n_rows = config.intermediate_size if config.is_gated_mlp else _n_inputs(config)
        self.up_proj = nn.Linear(config.hidden_size, n_rows, bias=has_bias)
        self.activation = _activation(config)
        self.norm_eps = config.rms_norm_eps if config.activation_norm else None
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self._normed(self.up_proj(x))))
        return self.down_proj(self.activation(self._normed(self.gate_proj(x))) * self.up_proj(x))

    def _normed(self, z: Tensor) -> Tensor:
        if self.norm_eps is None:
            return z
        return F.rms_norm(z.float(), z.shape[-1:], eps=self.norm_eps).to(z.dtype)


class PsannLMShortConv(nn.Module):
    """x + act(conv(x)): a causal depthwise convolution over time whose last inputs the cache keeps."""

    def __init__(self, config: PsannLMConfig, layer_idx: int, place: str) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.state_idx = (config.short_conv_places or []).index(place)
        self.dilation = config.short_conv_dilation_growth**layer_idx
        self.reach = (config.short_conv_kernel_size - 1) * self.dilation
        self.weight = nn.Parameter(torch.zeros(config.hidden_size, config.short_conv_kernel_size))
        is_sine = config.short_conv_activation == "sine"
        self.activation: nn.Module = PsannLMSine(config, config.hidden_size) if is_sine else nn.Identity()

    def forward(self, x: Tensor, conv_mask: Tensor | None, cache: Cache | None) -> Tensor:
        # Padding on the left of a row stands where zeros precede the row alone.
        inputs = x if conv_mask is None else x * conv_mask[:, :, None].to(x.dtype)
        inputs = inputs.transpose(1, 2)
        if cache is not None:
            # One slot more than the taps reach back: the stock cache cannot hold a state of length zero.
            inputs = cache.update_conv_state(
                inputs, self.layer_idx, state_idx=self.state_idx, conv_kernel_size=self.reach + 1
            )
        inputs = inputs[..., -(self.reach + x.shape[1]) :]
        # A prompt's cache returns the prompt alone, or zeros before it where it is short.
        inputs = F.pad(inputs, (self.reach + x.shape[1] - inputs.shape[-1], 0))
        mixed = F.conv1d(
            inputs.contiguous(),
            self.weight.unsqueeze(1).to(x.dtype),
            dilation=self.dilation,
            groups=self.weight.shape[0],
        )
        return x + self.activation(mixed.transpose(1, 2))


def _rope_tables(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (B, 1, T, K/2), float32, of positions (B, T): feature i is paired with i + K/2."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[:, None, :, None] * base**-exponents
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = tables
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _sinusoids(positions: Tensor, size: int) -> Tensor:
    """Return (B, T, D) float32: even features are sines and odd ones cosines of positions (B, T)."""
    exponents = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
    angles = positions.float().unsqueeze(-1) * _SINUSOID_BASE**-exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :size]


def _alibi_slopes(n_heads: int, device: torch.device) -> Tensor:
    """Return the (H,) float32 slopes of ALiBi (Press et al. 2021), for any number of heads."""

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    lower = 2 ** int(math.log2(n_heads))
    slopes = geometric(lower) + geometric(2 * lower)[0::2][: n_heads - lower]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def _alibi_mask(x: Tensor, n_heads: int, attention_mask: Tensor | None, n_past: int | Tensor) -> Tensor:
    """Return the bias (B or 1, H, T, S) in the dtype of x (B, T, D): slope * distance, and hidden keys at the minimum.

    Distances between slots equal distances between positions, whatever the padding on the left.
    """
    n_new = x.shape[1]
    if attention_mask is not None:
        n_keys = attention_mask.shape[-1]
    else:
        n_keys = int(n_past) + n_new
    queries = n_past + torch.arange(n_new, device=x.device)
    distance = torch.arange(n_keys, device=x.device) - queries[:, None]
    bias = _alibi_slopes(n_heads, x.device)[:, None, None] * distance
    visible = (distance <= 0)[None, None]
    if attention_mask is not None and attention_mask.ndim == 2:
        visible = visible & (attention_mask != 0)[:, None, None, :]
    elif attention_mask is not None:
        visible = visible & (attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0)
    return bias.masked_fill(~visible, torch.finfo(x.dtype).min).to(x.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Return softmax(q kᵀ scaling + mask) v as (B, T, H, K), and the weights (B, H, T, S)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class PsannLMQkvFeatures(nn.Module):
    """[cos z, sin z, GELU(r)], z and r from one matrix; ``fan_linear`` without the GELU, ``gelu`` with nothing else."""

    def __init__(self, size: int, kind: str) -> None:
        super().__init__()
        if kind not in ("fan", "fan_linear", "gelu"):
            raise ValueError(f"qkv_features {kind!r} is not one of fan, fan_linear, gelu")
        self.kind = kind
        self.n_pairs = size // 4
        self.proj = nn.Linear(size, size - self.n_pairs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projected = self.proj(x)
        wide = projected.float()
        z, r = wide[..., : self.n_pairs], wide[..., self.n_pairs :]
        if self.kind == "gelu":
            parts = (F.gelu(z), F.gelu(-z), F.gelu(r))
        else:
            parts = (torch.cos(z), torch.sin(z), F.gelu(r) if self.kind == "fan" else r)
        return torch.cat(parts, dim=-1).to(projected.dtype)


class PsannLMAttention(nn.Module):
    """Causal attention without biases, with grouped queries and, where configured, norms of queries and keys."""

    def __init__(self, config: PsannLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.features = None
        if config.qkv_features is not None:
            self.features = PsannLMQkvFeatures(config.hidden_size, config.qkv_features)
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = PsannLMRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = PsannLMRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rope: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        if self.features is not None:
            hidden_states = self.features(hidden_states)
        q = self.q_proj(hidden_states).view(shape)
        k = self.k_proj(hidden_states).view(shape)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if rope is not None:
            q, k = _rotate(q, rope), _rotate(k, rope)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        y, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(y.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class PsannLMDecoderLayer(GradientCheckpointingLayer):
    """x + α·attention(conv(norm(x))), then x + α·mlp(conv(norm(x))); conv and α only where configured."""

    def __init__(self, config: PsannLMConfig, layer_idx: int) -> None:
        super().__init__()

        def short_conv(place: str) -> PsannLMShortConv | None:
            return PsannLMShortConv(config, layer_idx, place) if place in (config.short_conv_places or []) else None

        self.input_layernorm = PsannLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention_conv = short_conv("attention")
        self.self_attn = PsannLMAttention(config, layer_idx)
        self.post_attention_layernorm = PsannLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp_conv = short_conv("mlp")
        self.mlp = PsannLMMLP(config)
        self.dropout = nn.Dropout(config.dropout)
        self.attention_scale = nn.Parameter(torch.ones(())) if config.residual_scale else None
        self.mlp_scale = nn.Parameter(torch.ones(())) if config.residual_scale else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        conv_mask: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        h = self.input_layernorm(hidden_states)
        if self.attention_conv is not None:
            h = self.attention_conv(h, conv_mask, cache)
        h, _ = self.self_attn(h, attention_mask=attention_mask, rope=rope, cache=cache, **kwargs)
        hidden_states = self._added(hidden_states, h, self.attention_scale)
        h = self.post_attention_layernorm(hidden_states)
        if self.mlp_conv is not None:
            h = self.mlp_conv(h, conv_mask, cache)
        return self._added(hidden_states, self.mlp(h), self.mlp_scale)

    def _added(self, x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
        branch = self.dropout(branch)
        return x + (branch if scale is None else branch * scale.to(branch.dtype))


def _raw(value: float) -> float:
    """Return x such that softplus(x) = ``value``."""
    return value + math.log(-math.expm1(-value))


def _init_phase(module: PsannLMSine | PsannLMGeluSine) -> None:
    if module.phase is not None:
        init.constant_(module.phase, module.phase_start)


class PsannLMPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization."""

    config: PsannLMConfig
    config_class = PsannLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PsannLMDecoderLayer"]  # noqa: RUF012  # as transformers declares it
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    # Rounded to bfloat16, a frequency would be off by up to 0.4 percent.
    _keep_in_fp32_modules_strict = {  # noqa: RUF012
        "raw_amplitude",
        "raw_frequency",
        "raw_decay",
        "sine_weight",
        "phase",
        "raw_input_gain",
        "raw_output_gain",
    }
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": PsannLMDecoderLayer,
        "attentions": PsannLMAttention,
    }

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PsannLMSine):
            # softplus(raw) is 1, 1 and 0.01, the defaults of psannlm.
            for name, value in zip(_SINE_PARAMETERS, (1.0, 1.0, 0.01), strict=True):
                init.constant_(getattr(module, f"raw_{name}"), _raw(value))
            _init_phase(module)
        elif isinstance(module, PsannLMGeluSine):
            _init_phase(module)
            init.constant_(module.sine_weight, _ADDED_SINE_WEIGHT)
            init.constant_(module.raw_frequency, _raw(1.0))
        elif isinstance(module, PsannLMGainedActivation):
            init.constant_(module.raw_input_gain, _raw(1.0))
            init.constant_(module.raw_output_gain, _raw(1.0))
        elif isinstance(module, PsannLMShortConv):
            init.zeros_(module.weight)
        elif isinstance(module, PsannLMDecoderLayer):
            for scale in (module.attention_scale, module.mlp_scale):
                if scale is not None:
                    init.ones_(scale)


class PsannLMModel(PsannLMPreTrainedModel):
    """Token ids to normalized hidden states."""

    def __init__(self, config: PsannLMConfig) -> None:
        super().__init__(config)
        implementation = config._attn_implementation
        if config.position_encoding == "alibi" and implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"attn_implementation {implementation!r} takes no ALiBi bias; load the model with "
                "attn_implementation='sdpa' or 'eager'"
            )
        if config.short_conv_places and implementation == "vllm":
            raise ValueError("vLLM's transformers backend keeps no states of convolutions; serve with transformers")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = PsannLMRMSNorm(config.hidden_size, config.rms_norm_eps) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(PsannLMDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = PsannLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        n_past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = _positions(x, attention_mask, n_past)
        causal_mask, conv_mask = self._masks(x, attention_mask, position_ids, cache, n_past)
        rope = None
        if self.config.position_encoding == "rope":
            rope = _rope_tables(position_ids, self.config.head_dim, self.config.rotary_base)
        elif self.config.position_encoding == "sinusoidal":
            sinusoids = _sinusoids(position_ids, self.config.hidden_size)
            x = x + _SINUSOID_STD * sinusoids.to(x.dtype)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, attention_mask=causal_mask, conv_mask=conv_mask, rope=rope, cache=cache, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), **{_CACHE: cache})

    def _masks(
        self,
        x: Tensor,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        position_ids: Tensor,
        cache: Cache | None,
        n_past: int | Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the mask of attention, and the (B, T) mask of the convolutions, which is zero at padding."""
        conv_mask = None
        if isinstance(attention_mask, dict):  # prepared by generate, for a cache of fixed size
            conv_mask = attention_mask.get("linear_attention")
            attention_mask = attention_mask.get("full_attention")
        common = {"config": self.config, "inputs_embeds": x, "attention_mask": attention_mask, _CACHE: cache}
        if conv_mask is None and self.config.short_conv_places:
            conv_mask = create_recurrent_attention_mask(**common)
        if self.config.position_encoding == "alibi":
            return _alibi_mask(x, self.config.num_attention_heads, attention_mask, n_past), conv_mask
        return create_causal_mask(**common, position_ids=position_ids), conv_mask


def _positions(x: Tensor, attention_mask: Any, n_past: int | Tensor) -> Tensor:
    """Return the positions (B, T) of new tokens: those of a padded row count from its first token."""
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -x.shape[1] :]
    return (n_past + torch.arange(x.shape[1], device=x.device)).unsqueeze(0)


class PsannLMForCausalLM(PsannLMPreTrainedModel, GenerationMixin):
    """Language model of psannlm."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PsannLMConfig) -> None:
        super().__init__(config)
        self.model = PsannLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{_CACHE: getattr(outputs, _CACHE)},
        )


__all__ = ["PsannLMForCausalLM", "PsannLMModel", "PsannLMPreTrainedModel"]

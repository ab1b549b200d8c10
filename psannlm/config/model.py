"""The ``model`` section: architecture of the network. Public YAML names are mapped to code names only here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

from pydantic import Field

from psannlm.config.base import Check, Flag, PositiveWhole, Real, Section, Whole

BaseName = Literal["respsann", "waveresnet", "transformer"]
MlpKind = Literal[
    "sine",
    "sineglu",
    "gelu",
    "geglu",
    "swiglu",
    "relu2",
    "silu",
    "tanh",
    "tanhglu",
    "sigmoid",
    "sigmoidglu",
    "clampedsine",
    "clampedsineglu",
    "gelusine",
    "sinerelu2",
]
# Kinds that have a sine, and those that are nothing else: elsewhere the keys of the sine have no effect.
PHASE_KINDS: frozenset[MlpKind] = frozenset(kind for kind in get_args(MlpKind) if "sine" in kind)
QUADRATURE_KINDS: frozenset[MlpKind] = frozenset(("sine", "sineglu"))
# Kind of feed-forward of a base where ``mlp`` is null.
BASE_MLP: dict[BaseName, MlpKind] = {"respsann": "sine", "waveresnet": "sineglu", "transformer": "swiglu"}
QkvFeaturesKind = Literal["fan", "fan_linear", "gelu"]
# Rows of the matrix of qkv_features that give two features each, as a fraction of d_model.
QKV_PAIRS_FRACTION = 0.25
PositionKind = Literal["rope", "alibi", "sinusoidal"]
SineParameter = Literal["amplitude", "frequency", "decay"]
ConvPlace = Literal["attention", "mlp"]


class SineConfig(Section):
    """y = A exp(-d g(z)) sin(f z), with one A, f, d per hidden feature."""

    amp_init: Real = Field(1.0, gt=0, description="initial amplitude A")
    amp_std: Real = Field(0.0, ge=0, description="standard deviation of the initial A over the features")
    freq_init: Real = Field(1.0, gt=0, description="initial angular frequency f, in radians per unit of z")
    freq_std: Real = Field(0.0, ge=0, description="standard deviation of the initial f over the features")
    damp_init: Real = Field(0.01, gt=0, description="initial decay d")
    damp_std: Real = Field(0.0, ge=0, description="standard deviation of the initial d over the features")
    decay_mode: Literal["abs", "relu", "none"] = Field(
        "abs", description="decay function g(z): |z| (abs), max(z, 0) (relu) or 0 (none)"
    )
    trainable: Flag = Field(True, description="train A, f and d; false: freeze them")
    learnable: tuple[SineParameter, ...] | None = Field(
        None, description="trainable parameters; null: all if trainable is true, else none"
    )
    amp_bounds: tuple[Real, Real] | None = Field(None, description="bounds of A as [lowest, highest]; null: none")
    freq_bounds: tuple[Real, Real] | None = Field(None, description="bounds of f as [lowest, highest]; null: none")
    damp_bounds: tuple[Real, Real] | None = Field(None, description="bounds of d as [lowest, highest]; null: none")

    def checks(self) -> list[Check]:
        found: list[Check] = []
        for name, init in (("amp", self.amp_init), ("freq", self.freq_init), ("damp", self.damp_init)):
            bounds: tuple[float, float] | None = getattr(self, f"{name}_bounds")
            if bounds is None:
                continue
            low, high = bounds
            if not 0 <= low < high:
                found.append(Check((f"{name}_bounds",), f"[{low}, {high}] is not an interval of positive numbers"))
            elif not low <= init <= high:
                message = f"{name}_init {init} lies outside [{low}, {high}]; widen the bounds or move the start"
                found.append(Check((f"{name}_bounds", f"{name}_init"), message))
        if not self.trainable and self.learnable:
            message = (
                f"{list(self.learnable)} cannot learn while trainable is false; set trainable: true or drop learnable"
            )
            found.append(Check(("learnable", "trainable"), message))
        return found

    def learnable_parameters(self) -> tuple[SineParameter, ...]:
        """Return which of amplitude, frequency and decay receive gradients."""
        if not self.trainable:
            return ()
        return ("amplitude", "frequency", "decay") if self.learnable is None else self.learnable


class ShortConvConfig(Section):
    """The short causal depthwise convolution over time. Null takes the base's own setting."""

    enabled: Flag | None = Field(None, description="null: on for waveresnet, off for the other bases")
    kernel_size: Whole = Field(4, ge=1, description="taps of the convolution, in positions, including the current one")
    dilation_growth: Whole = Field(1, ge=1, description="the dilation of layer i is dilation_growth ** i")
    places: tuple[ConvPlace, ...] = Field(
        ("attention", "mlp"), description="sublayers whose normalized input is convolved"
    )
    activation: Literal["none", "sine"] = Field("none", description="activation of the convolution's output")

    def checks(self) -> list[Check]:
        if self.enabled and not self.places:
            return [Check(("places", "enabled"), "empty while short_conv.enabled is true; name attention, mlp or both")]
        return []


class ModelConfig(Section):
    """A decoder-only language model. Null fields are filled in by the base (``models/registry.py``)."""

    former_keys: ClassVar[Mapping[str, str]] = {"wave": "short_conv"}

    base: BaseName = Field(
        "waveresnet", description="architecture preset: waveresnet, respsann, or the baseline transformer"
    )
    d_model: Whole = Field(512, ge=1, description="width of the residual stream")
    n_layers: Whole = Field(8, ge=1, description="number of transformer blocks")
    n_heads: Whole = Field(8, ge=1, description="number of query heads; must divide d_model")
    n_kv_heads: PositiveWhole | None = Field(
        None, description="number of key/value heads; must divide n_heads; null: n_heads"
    )
    d_mlp: PositiveWhole | None = Field(
        None,
        description="hidden width; null: 4 d_model, for gated kinds 8/3 d_model rounded up to a multiple of 64 (with "
        "sine_quadrature 16/3 and 16/5 d_model, rounded to a multiple of 32)",
    )
    mlp: MlpKind | None = Field(
        None, description="kind of feed-forward (docs/guides/feed-forward.md); null: that of the base"
    )
    vocab_size: PositiveWhole | None = Field(None, description="vocabulary size; null: that of the tokenizer")
    max_seq_len: PositiveWhole | None = Field(
        None, description="maximum context in tokens; null: data.max_length (alibi may exceed it)"
    )
    positional_encoding: PositionKind = Field(
        "rope", description="positional encoding: rope (needs an even head size), alibi or sinusoidal"
    )
    rope_theta: Real = Field(
        10_000.0, ge=1, description="base of rope's wavelengths, which grow from 2π to rope_theta x 2π positions"
    )
    sine_params: SineConfig = Field(default_factory=SineConfig, description="the sine activation")
    sine_phase: Real | None = Field(
        None,
        description="initial phase p, in radians, of a sine A exp(-d g(z)) (sin(f z + p) - sin p) with a learned p per "
        "hidden feature, in every kind of feed-forward with a sine; null: no phase",
    )
    sine_quadrature: Flag = Field(
        False,
        description="make two hidden features, sin(f z) and cos(f z), from each row of the matrix before the sine, in "
        "sine and sineglu; d_mlp counts both",
    )
    activation_gains: Flag = Field(
        False,
        description="learn a positive gain of the activation's input and one of its output for each hidden feature, in "
        "any kind of feed-forward",
    )
    activation_norm: Flag = Field(
        False,
        description="RMSNorm, without weights, of the input of the feed-forward's activation over the hidden features",
    )
    gate_init_scale: Real = Field(
        1.0,
        gt=0,
        description="factor of the initial weights of the matrix before the activation: that of the gate in gated "
        "kinds, else the first; without it they are drawn for an input of unit variance",
    )
    short_conv: ShortConvConfig = Field(
        default_factory=ShortConvConfig, description="the short causal depthwise convolution"
    )
    residual_scale: Flag | None = Field(
        None, description="scale each residual branch by a learnable factor; null: the setting of the base"
    )
    qk_norm: Flag = Field(False, description="QK-norm: RMSNorm on the queries and keys of each head")
    qkv_features: QkvFeaturesKind | None = Field(
        None,
        description="features from which queries, keys and values are projected: fan (a FAN layer: cosines and sines "
        "of a quarter of the rows of a matrix, GELU of the others), fan_linear (the others without GELU, as in "
        "FANformer), gelu (the same matrix with GELU alone); null: the input of attention itself",
    )
    embedding_norm: Flag = Field(
        False, description="RMSNorm of the embedding, positions of sinusoidal included, before the first block"
    )
    norm_eps: Real = Field(
        1e-6, ge=1e-12, lt=1, description="epsilon of every RMSNorm, added to the mean square before the root"
    )
    dropout: Real = Field(
        0.0, ge=0, lt=1, description="dropout probability of branch outputs and embeddings in training"
    )
    tie_embeddings: Flag = Field(False, description="tie the output matrix to the embedding matrix")

    def checks(self) -> list[Check]:
        found: list[Check] = []
        if self.d_model % self.n_heads:
            message = f"{self.n_heads} heads do not divide d_model {self.d_model}; {self._nearby_heads()}"
            found.append(Check(("n_heads", "d_model"), message))
        elif self.positional_encoding == "rope" and (self.d_model // self.n_heads) % 2:
            message = (
                f"rope rotates pairs of features, but d_model {self.d_model} / n_heads {self.n_heads} gives the odd "
                f"head size {self.d_model // self.n_heads}; {self._nearby_heads()}, or positional_encoding: alibi"
            )
            found.append(Check(("positional_encoding", "n_heads", "d_model"), message))
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            message = f"{self.n_kv_heads} key/value heads do not divide {self.n_heads} query heads"
            found.append(Check(("n_kv_heads", "n_heads"), message))
        if self.qkv_features is not None and self.d_model * QKV_PAIRS_FRACTION < 1:
            message = (
                f"{self.qkv_features} needs a d_model of 4 or more, and it is {self.d_model}; raise it, or drop this"
            )
            found.append(Check(("qkv_features", "d_model"), message))
        if self.activation_norm and self.gate_init_scale != 1.0:
            message = "has no effect with activation_norm, which divides by the scale of its input; drop one of them"
            found.append(Check(("gate_init_scale", "activation_norm"), message))
        mlp = self.mlp or BASE_MLP[self.base]
        for key, is_set, kinds in (
            ("sine_phase", self.sine_phase is not None, PHASE_KINDS),
            ("sine_quadrature", self.sine_quadrature, QUADRATURE_KINDS),
        ):
            if is_set and mlp not in kinds:
                message = f"has no effect with mlp: {mlp}; set mlp to one of {', '.join(sorted(kinds))}, or drop it"
                found.append(Check((key, "mlp", "base"), message))
        if self.sine_quadrature and self.sine_phase is not None:
            message = "sine and cosine of a row already add up to any phase; drop it, or sine_quadrature"
            found.append(Check(("sine_phase", "sine_quadrature"), message))
        return found

    def _nearby_heads(self) -> str:
        # Searched around n_heads only: d_model may be any number a person can mistype.
        centre = min(self.n_heads, self.d_model)
        window = range(max(1, centre - 256), min(self.d_model, centre + 256) + 1)
        divisors = [n for n in window if self.d_model % n == 0]
        if self.positional_encoding == "rope":
            divisors = [n for n in divisors if (self.d_model // n) % 2 == 0]
        close = sorted(sorted(divisors, key=lambda n: abs(n - centre))[:3])
        return f"try n_heads {' or '.join(map(str, close))}" if close else "change d_model"

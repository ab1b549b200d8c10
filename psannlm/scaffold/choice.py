"""Choice of model, vocabulary, batch and steps for a corpus and a machine, each with its reason in a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from psannlm.config.model import BaseName
from psannlm.scaffold.survey import Machine, TextSurvey

SizeName = Literal["tiny", "small", "gpu"]
SIZES: tuple[SizeName, ...] = ("tiny", "small", "gpu")

_GIB = 1 << 30
# A GPU of today's desktops, where the machine that runs ``init`` has none.
_ASSUMED_GPU_BYTES = 24 * _GIB
# Vocabulary by bytes of text: an entry should occur often enough to be learned.
_VOCABULARIES = ((200_000, 512), (5_000_000, 2048), (50_000_000, 4096), (500_000_000, 8192), (5_000_000_000, 16_384))
_LARGEST_VOCABULARY = 32_000
# Bytes of text per token of English with a vocabulary of that size, for estimates alone.
_BYTES_PER_TOKEN = {512: 2.2, 1024: 2.8, 2048: 3.3, 4096: 3.7, 8192: 4.0, 16_384: 4.3, 32_000: 4.5}
# Memory of a training step on a GPU: activations of 8 layers of 512 in bf16, and the logits of one token.
_ACTIVATION_BYTES_PER_TOKEN = 300_000
_LOGIT_BYTES = 12
_GPU_FRACTION = 0.6


@dataclass(frozen=True)
class _Preset:
    """Shape and budget of a size, before text and machine bend them."""

    d_model: int
    n_layers: int
    n_heads: int
    max_vocab: int
    max_length: int
    step_tokens: int
    budget_tokens: int
    most_passes: float
    lr: float
    what: str


_PRESETS: dict[SizeName, _Preset] = {
    "tiny": _Preset(64, 2, 2, 1024, 256, 1024, 204_800, 20.0, 1.6e-2, "about a minute on a CPU"),
    "small": _Preset(192, 4, 3, 4096, 256, 4096, 1_638_400, 15.0, 1.6e-2, "minutes on a CPU"),
    "gpu": _Preset(512, 8, 8, 32_000, 512, 131_072, 540_000_000, 6.0, 2e-3, "for one GPU, or several"),
}


@dataclass(frozen=True)
class Choice:
    """The values of a configuration that depend on text and machine.

    Attributes:
        passes: how often training reads its text; an estimate.
        val_split: 0 with a prepared folder, which has a validation part of its own.
        vocab_size: None with a prepared folder, which has its tokenizer.
        is_small_text: training reads the text several times, so it is regularized.
    """

    size: SizeName
    base: BaseName
    what: str
    d_model: int
    n_layers: int
    n_heads: int
    vocab_size: int | None
    max_length: int
    val_split: float
    batch_tokens: int
    grad_accum_steps: int
    max_steps: int
    warmup_steps: int
    eval_interval_steps: int
    lr: float
    passes: float
    is_small_text: bool
    amp: Literal["auto", "fp16"]

    @property
    def step_tokens(self) -> int:
        """Tokens in one optimizer step on one device."""
        return self.batch_tokens * self.grad_accum_steps

    @property
    def budget_tokens(self) -> int:
        """Training tokens of the run on one device."""
        return self.step_tokens * self.max_steps


def choose(text: TextSurvey, machine: Machine, size: SizeName, base: BaseName) -> Choice:
    """Return what fits the text and the machine; the same survey gives the same values."""
    preset = _PRESETS[size]
    vocab_size = None if text.manifest is not None else min(preset.max_vocab, _vocabulary(text.n_bytes))
    val_split = 0.0 if text.manifest is not None else _val_split(text.n_bytes)
    n_tokens = _training_tokens(text, vocab_size, val_split)
    # Eight windows at least, so that their order says something.
    max_length = max(16, min(preset.max_length, _power_of_two(n_tokens // 8)))
    step_tokens = max(max_length, min(_step_tokens(preset, size, machine, n_tokens), _power_of_two(n_tokens // 2)))
    batch_tokens = max(max_length, min(step_tokens, _tokens_in_memory(size, machine, vocab_size)))
    budget = _budget_tokens(preset, size, machine)
    max_steps = max(20, round(min(budget, preset.most_passes * n_tokens) / step_tokens))
    passes = max_steps * step_tokens / n_tokens
    return Choice(
        size=size,
        base=base,
        what=preset.what,
        d_model=preset.d_model,
        n_layers=preset.n_layers,
        n_heads=preset.n_heads,
        vocab_size=vocab_size,
        max_length=max_length,
        val_split=val_split,
        batch_tokens=batch_tokens,
        grad_accum_steps=step_tokens // batch_tokens,
        max_steps=max_steps,
        warmup_steps=max(1, min(max_steps // 20, 200)),
        eval_interval_steps=max(1, max_steps // 8),
        lr=preset.lr,
        passes=passes,
        is_small_text=passes > 3,
        amp="fp16" if machine.gpu is not None and machine.has_bf16 is False else "auto",
    )


def _vocabulary(n_bytes: int) -> int:
    return next((vocab for limit, vocab in _VOCABULARIES if n_bytes < limit), _LARGEST_VOCABULARY)


def _val_split(n_bytes: int) -> float:
    """A tenth of little text, less of much: a few megabytes measure a loss to the third digit."""
    if n_bytes < 10_000_000:
        return 0.1
    return 0.05 if n_bytes < 100_000_000 else 0.01


def _training_tokens(text: TextSurvey, vocab_size: int | None, val_split: float) -> int:
    if text.manifest is not None:
        return max(1, text.manifest.train.tokens)
    return max(1, round(text.n_bytes * (1 - val_split) / _BYTES_PER_TOKEN[vocab_size or 4096]))


def _step_tokens(preset: _Preset, size: SizeName, machine: Machine, n_tokens: int) -> int:
    if size == "gpu":
        # Of little text a step of 128k tokens is all there is: a pass then has 64 steps at least.
        return min(preset.step_tokens, max(8192, _power_of_two(n_tokens // 64)))
    # Many cores wait for each other in small products.
    return preset.step_tokens * (1 if machine.n_cores < 8 else 2 if machine.n_cores < 32 else 4)


def _budget_tokens(preset: _Preset, size: SizeName, machine: Machine) -> int:
    """More cores train on more tokens in the same time; the preset is for two."""
    return preset.budget_tokens if size == "gpu" else preset.budget_tokens * max(1, min(machine.n_cores // 2, 8))


def _tokens_in_memory(size: SizeName, machine: Machine, vocab_size: int | None) -> int:
    """Tokens of a micro-batch that the device's memory holds; a CPU holds any that a step has here."""
    if size != "gpu":
        return 1 << 20
    memory = machine.gpu_bytes or _ASSUMED_GPU_BYTES
    per_token = _ACTIVATION_BYTES_PER_TOKEN + _LOGIT_BYTES * (vocab_size or _LARGEST_VOCABULARY)
    return _power_of_two(int(_GPU_FRACTION * memory) // per_token)


def _power_of_two(n: int) -> int:
    """Return the largest power of two that is not above ``n``, and at least 1."""
    return 1 << max(0, n.bit_length() - 1)

"""Reference model of the benchmarks: the Llama of Hugging Face transformers at the parameter count of our model."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import util
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from psannlm.benchmarks.decoding.modes import DecodeRun, Prompts
from psannlm.benchmarks.harness.interleaved import Clock
from psannlm.config.model import ModelConfig
from psannlm.errors import ConfigError, PsannlmError, install_extra, nearest

REFERENCE_MODELS = ("transformers",)
# Widths that are not a multiple of it would slow the reference model's matrix products down.
_WIDTH_STEP = 16


class ReferenceModel(Protocol):
    """Decoder-only model of another library, with random weights."""

    name: str
    description: str
    parameters: int

    def generate(self, prompts: Prompts, max_new_tokens: int) -> Prompts:
        """Return the greedy continuation of each prompt, ``max_new_tokens`` tokens long."""
        ...


def require_reference_model(name: str) -> None:
    """Raise ConfigError if the reference model is unknown or its package is not installed."""
    if name not in REFERENCE_MODELS:
        raise ConfigError(
            f"--against {name!r:.40} is not one of {', '.join(REFERENCE_MODELS)}{nearest(name, REFERENCE_MODELS)}"
        )
    if util.find_spec(name) is None:
        raise ConfigError(f"--against {name} needs the package {name}, which is not installed; {install_extra('hf')}")


def build_reference_model(
    name: str, config: ModelConfig, parameters: int, seq_len: int, device: torch.device
) -> ReferenceModel:
    """Build the reference model ``name`` at the size of our model.

    Args:
        config: our model's resolved configuration.
        parameters: parameter count of our model, which the reference model approaches as closely as its width allows.
        seq_len: maximum number of tokens of a row.

    Raises:
        ConfigError: the reference model is unknown, or its package is not installed.
    """
    require_reference_model(name)
    return Llama(config, parameters, seq_len, device)


@dataclass(frozen=True)
class ReferenceRuns:
    """Runs of a reference model; ``first_s`` are the seconds of its first run, compilation included."""

    name: str
    description: str
    parameters: int
    first_s: float
    runs: list[DecodeRun]


def decode_with(
    reference_model: ReferenceModel, prompts: Prompts, max_new_tokens: int, clock: Clock = time.perf_counter
) -> DecodeRun:
    """Decode the prompts with ``reference_model``; its prefill time is that of generating one token.

    Raises:
        PsannlmError: it generated fewer tokens than requested, or one token took longer than all of them.
    """
    began = clock()
    reference_model.generate(prompts, 1)
    between = clock()
    ids = reference_model.generate(prompts, max_new_tokens)
    ended = clock()
    if any(len(row) != max_new_tokens for row in ids) or len(ids) != len(prompts):
        raise PsannlmError(
            f"{reference_model.name} generated {[len(row) for row in ids]} tokens per row instead of {max_new_tokens}"
        )
    prefill_s, total_s = between - began, ended - between
    if prefill_s >= total_s:
        raise PsannlmError(
            f"{reference_model.name} took {total_s:.4f} s for {max_new_tokens} tokens and {prefill_s:.4f} s for one: "
            "too few to separate decoding from prefill; raise --max-new-tokens"
        )
    return DecodeRun(ids, max_new_tokens, prefill_s, prefill_s, total_s - prefill_s, total_s)


def llama_parameters(config: ModelConfig, width: int) -> int:
    """Return the parameter count of a Llama of our sizes with feed-forwards (gated, no bias) of ``width``."""
    d_model, vocab = config.d_model, config.vocab_size or 0
    head_dim = d_model // config.n_heads
    attention = 2 * d_model * d_model + 2 * d_model * head_dim * (config.n_kv_heads or config.n_heads)
    block = attention + 3 * d_model * width + 2 * d_model
    return (1 if config.tie_embeddings else 2) * vocab * d_model + config.n_layers * block + d_model


def llama_width(config: ModelConfig, parameters: int) -> int:
    """Return the feed-forward width, a multiple of 16, at which a Llama of our sizes is nearest to ``parameters``."""
    for_width = parameters - llama_parameters(config, 0)
    width = for_width / (3 * config.d_model * config.n_layers)
    return max(1, round(width / _WIDTH_STEP)) * _WIDTH_STEP


def llama_flops_per_token(config: ModelConfig, width: int, seq_len: int) -> int:
    """Return the operations per training token of that Llama, counted as in ``accounting.flops_per_token``."""
    lookup = 0 if config.tie_embeddings else (config.vocab_size or 0) * config.d_model
    norms = (2 * config.n_layers + 1) * config.d_model
    matrices = llama_parameters(config, width) - lookup - norms
    return 6 * matrices + 12 * config.n_layers * config.d_model * seq_len


def _transformers() -> Any:
    # Imported late: it takes seconds and is an optional extra.
    return importlib.import_module("transformers")


def _build_llama(config: ModelConfig, width: int, seq_len: int, seed: int) -> Any:
    """Return a ``LlamaForCausalLM`` of our sizes with feed-forwards of ``width``, in float32 on the CPU."""
    transformers = _transformers()
    sizes = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=width,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads or config.n_heads,
        max_position_embeddings=seq_len,
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(sizes).float()


class TrainableLlama(nn.Module):
    """The same ``LlamaForCausalLM`` for training, with its own attention (sdpa), logits and loss.

    Its parameters have our names where optimizers group by name, so that Muon updates the same matrices.
    """

    def __init__(self, config: ModelConfig, parameters: int, seq_len: int, seed: int, grad_checkpoint: bool) -> None:
        super().__init__()
        self.width = llama_width(config, parameters)
        llama = _build_llama(config, self.width, seq_len, seed)
        llama.config.use_cache = False
        if grad_checkpoint:
            llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.embedding = llama.model.embed_tokens
        self.blocks = llama.model.layers
        self.llama = llama
        self.parameter_count = sum(parameter.numel() for parameter in llama.parameters())
        self.description = (
            f"transformers {_transformers().__version__}, LlamaForCausalLM, sdpa, {self.parameter_count:,} parameters "
            f"(feed-forward width {self.width:,})"
        )

    def forward(self, input_ids: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the summed cross-entropy in nats; ``labels`` (B, T) are aligned with the inputs.

        Raises:
            PsannlmError: ``label_smoothing`` is not 0, which the Llama does not support.
        """
        if label_smoothing:
            raise PsannlmError("the Llama of transformers has no label smoothing")
        # With num_items_in_batch=1 the loss is the sum over labels, not their mean.
        out = self.llama(input_ids=input_ids, labels=labels, shift_labels=labels, num_items_in_batch=1)
        loss: Tensor = out.loss
        return loss


class Llama:
    """``LlamaForCausalLM`` of Hugging Face transformers in float32, with a static cache and compiled decoding."""

    name = "transformers"

    def __init__(self, config: ModelConfig, parameters: int, seq_len: int, device: torch.device) -> None:
        self._transformers = _transformers()
        width = llama_width(config, parameters)
        self._model = _build_llama(config, width, seq_len, seed=0).eval().to(device)
        # On a CPU, transformers compiles only if this attribute is set.
        compile_config = self._transformers.CompileConfig()
        compile_config._compile_all_devices = True
        self._model.generation_config.compile_config = compile_config
        self.parameters = sum(parameter.numel() for parameter in self._model.parameters())
        self.description = (
            f"transformers {self._transformers.__version__}, LlamaForCausalLM, {self.parameters:,} parameters "
            f"(feed-forward width {width:,}), float32, static cache, compiled"
        )

    def generate(self, prompts: Prompts, max_new_tokens: int) -> Prompts:
        """Return the greedy continuation of each prompt, ``max_new_tokens`` tokens long."""
        input_ids = torch.tensor(prompts, device=self._model.device)
        with self._quiet():
            output = self._model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                min_new_tokens=max_new_tokens,
                do_sample=False,
                cache_implementation="static",
                pad_token_id=0,
            )
        continuations: Prompts = output[:, input_ids.shape[1] :].tolist()
        return continuations

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Silence transformers' warnings, which would break the progress line."""
        logging = self._transformers.logging
        before = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(before)

"""Reference model of the benchmarks: the Llama of Hugging Face transformers at the parameter count of our model."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from psannlm.benchmarks.decoding.modes import Prompts
from psannlm.config.model import ModelConfig
from psannlm.errors import PsannlmError

# Widths that are not a multiple of it would slow the reference model's matrix products down.
_WIDTH_STEP = 16


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

"""A model as a folder of transformers: configuration, weights, tokenizer and, for custom code, two Python files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from psannlm.config.model import ModelConfig
from psannlm.errors import ArtifactError, ConfigError
from psannlm.export import custom_mapping, plain_mapping
from psannlm.export.fast_tokenizer import fast_tokenizer_files
from psannlm.io.atomic import write_bytes
from psannlm.models.artifact import LoadedModel
from psannlm.models.registry import build_model
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.base import Tokenizer

CONFIG_FILE, GENERATION_CONFIG_FILE = "config.json", "generation_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Target:
    """How a model is expressed in transformers.

    Attributes:
        architecture: the class that computes it.
        is_custom: whether that class comes with the folder, as code.
        reason: why no class of transformers itself computes it; None for one of those.
    """

    architecture: str
    is_custom: bool
    reason: str | None = None


@dataclass(frozen=True)
class Loader:
    """Whether a program can load an exported folder, and why or why not."""

    name: str
    is_able: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {'yes' if self.is_able else 'no'}, {self.reason}"


def choose_target(config: ModelConfig, *, is_custom: bool = False) -> Target:
    """Return the class for a model of the resolved ``config``; ``is_custom`` asks for custom code in any case."""
    reason = plain_mapping.why_not_plain(config)
    if reason is None and is_custom:
        reason = "the option --custom-code"
    if reason is not None:
        return Target(custom_mapping.ARCHITECTURE, True, reason)
    return Target(plain_mapping.plain_class(config).architecture, False)


def loaders(config: ModelConfig, target: Target) -> list[Loader]:
    """Return which of transformers, vLLM and llama.cpp can load a model exported as ``target``."""
    if not target.is_custom:
        architecture = target.architecture
        activation = plain_mapping.plain_class(config).hidden_act
        native = {"LlamaForCausalLM": "silu", "Qwen3ForCausalLM": "silu", "ArceeForCausalLM": "relu2"}[architecture]
        fits = activation == native
        return [
            Loader("transformers", True, f"as {architecture}, without custom code"),
            Loader("vLLM", True, f"as {architecture} (not tested here)"),
            Loader("llama.cpp", fits, _llama_cpp_reason(architecture, activation, fits)),
        ]
    return [
        Loader("transformers", True, "with trust_remote_code=True, or after `import psannlm.hf`"),
        _vllm(config),
        Loader("llama.cpp", False, f"it has no architecture with {target.reason}"),
    ]


def _llama_cpp_reason(architecture: str, activation: str, fits: bool) -> str:
    if fits:
        return "after: psannlm export --format gguf"
    return f"its architecture for {architecture} fixes another activation than {activation}"


def _vllm(config: ModelConfig) -> Loader:
    if config.short_conv.enabled:
        return Loader("vLLM", False, "its transformers backend keeps no states of short convolutions")
    if config.positional_encoding == "alibi":
        return Loader("vLLM", False, "its transformers backend passes no ALiBi bias")
    reason = "by its transformers backend, with --trust-remote-code (not tested here)"
    return Loader("vLLM", True, reason)


def write_folder(
    folder: Path, loaded: LoadedModel, target: Target, *, dtype: torch.dtype | None, max_shard_bytes: int
) -> None:
    """Write configuration, weights and tokenizer of ``loaded``, and the code that ``target`` needs, to ``folder``.

    Args:
        dtype: of the weights; None keeps that of each tensor.
        max_shard_bytes: largest size of one file of weights; a single tensor may be larger.

    Raises:
        ArtifactError: the model has no tokenizer.
        TokenizerError: its tokenizer has a setting that ``tokenizer.json`` cannot express.
        ConfigError: the configuration has no maximum context.
        OSError: a file cannot be written.
    """
    model, tokenizer = loaded.model, require_tokenizer(loaded)
    config = model.config
    if config.max_seq_len is None:
        raise ConfigError("model.max_seq_len: is null, and config.json needs the maximum context; set it")
    files = fast_tokenizer_files(tokenizer, config.max_seq_len)
    stored = dtype or model.embedding.weight.dtype
    fields = (custom_mapping.custom_config if target.is_custom else plain_mapping.plain_config)(config, stored)
    ids = {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    _write_json(folder / CONFIG_FILE, {**fields, **ids})
    # Never generated here either. Without the list, the greedy text of transformers could differ.
    suppressed = suppressed_ids(config, tokenizer)
    _write_json(folder / GENERATION_CONFIG_FILE, {**ids, "suppress_tokens": suppressed} if suppressed else ids)
    for name, content in files.items():
        write_bytes(folder / name, content)
    if target.is_custom:
        for name in custom_mapping.CODE_FILES:
            write_bytes(folder / name, code_file(name))
    _write_weights(folder, dict(exported_tensors(model, target, dtype)), max_shard_bytes)


def require_tokenizer(loaded: LoadedModel) -> Tokenizer:
    """Return the tokenizer of a model. Raises ArtifactError if it has none."""
    if loaded.tokenizer is None:
        raise ArtifactError(
            "the model file has no tokenizer, and the text of an exported model would depend on a guess; save it with "
            "one: psannlm train does, and in Python psannLM.save after a fit"
        )
    return loaded.tokenizer


def suppressed_ids(config: ModelConfig, tokenizer: Tokenizer) -> list[int]:
    """Return the ids that are never generated: special tokens but the end, and ids beyond the tokenizer's."""
    special = sorted(tokenizer.special_ids - {tokenizer.eos_id})
    return [*special, *range(tokenizer.vocab_size, config.vocab_size or 0)]


def code_file(name: str) -> bytes:
    """Return the content of one of ``custom_mapping.CODE_FILES``, as it is in this package."""
    return resources.files("psannlm.export").joinpath(name).read_bytes()


def exported_tensors(model: Transformer, target: Target, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the tensor of each entry of the exported weights; a tied output matrix is left out."""
    mapping = custom_mapping.custom_tensors if target.is_custom else plain_mapping.plain_tensors
    for name, tensor in mapping(model.state_dict(), dtype):
        yield name, tensor.contiguous()


def reference_model(model: Transformer, target: Target, dtype: torch.dtype | None) -> Transformer:
    """Return a float32 model with the exported weights: scales folded, and rounded to ``dtype``."""
    config = model.config if target.is_custom else model.config.model_copy(update={"residual_scale": False})
    our_name = custom_mapping.our_name if target.is_custom else plain_mapping.our_name
    reference = build_model(config, device="meta")
    state = {str(our_name(name)): tensor.float() for name, tensor in exported_tensors(model, target, dtype)}
    reference.load_state_dict(state, assign=True)
    return reference.eval()


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    write_bytes(path, (json.dumps(fields, indent=2) + "\n").encode("ascii"))


def _write_weights(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write ``model.safetensors``, or numbered shards with ``model.safetensors.index.json``."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    plan = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_bytes)
    for name, keys in plan.filename_to_tensors.items():
        save_file({key: tensors[key] for key in keys}, folder / name, metadata={"format": "pt"})
        # The library makes files that only their owner reads.
        shutil.copymode(folder / CONFIG_FILE, folder / name)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)

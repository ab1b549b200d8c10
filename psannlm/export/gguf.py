"""A model as one GGUF file: weights, settings and tokenizer for llama.cpp and the programs built on it.

GGUF describes no network: it names an architecture that llama.cpp knows, and its numbers. Of ours it knows the plain
transformer with the SwiGLU or squared-ReLU feed-forward.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from psannlm.config.model import ModelConfig
from psannlm.errors import ConfigError, install_extra
from psannlm.export.gguf_tokenizer import GgufTokenizer, gguf_tokenizer
from psannlm.export.plain_mapping import our_name, plain_class, plain_tensors, why_not_plain
from psannlm.models.registry import build_model
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.base import Tokenizer

GgufType = Literal["float32", "bfloat16", "float16"]
# Blocks of 32 int8 with a scale each: what benchmarks compare our int8 with.
Q8_0 = "q8_0"
# The length of a row of such a matrix is a multiple of it.
Q8_0_BLOCK = 32
_INSTEAD = "export it with --format hf"
_TORCH_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Names of the package's two enumerations: of a tensor's type, and of the type of most of a file's tensors.
_TYPE_NAMES = {
    "float32": ("F32", "ALL_F32"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "float16": ("F16", "MOSTLY_F16"),
    Q8_0: ("Q8_0", "MOSTLY_Q8_0"),
}
# model_type of transformers -> its one activation in llama.cpp. The architecture has the same name there.
_ACTIVATIONS = {"llama": "silu", "qwen3": "silu", "arcee": "relu2"}
# llama.cpp rotates neighbouring features of a head in these, and the two halves of a head, as we do, in qwen3.
_PAIRED_ROPE = ("llama", "arcee")


@dataclass(frozen=True)
class GgufFile:
    """What was written: the architecture, and what differs in use, one sentence each."""

    architecture: str
    notices: tuple[str, ...]


def require_gguf() -> None:
    """Raise ConfigError where the package gguf is not installed."""
    if find_spec("gguf") is None:
        raise ConfigError(f"--format gguf needs the package gguf, which is not installed; {install_extra('gguf')}")


def _gguf() -> Any:
    # Imported late: it is an optional extra.
    return importlib.import_module("gguf")


def gguf_architecture(config: ModelConfig) -> str:
    """Return the architecture of llama.cpp that computes what a model of the resolved ``config`` computes.

    Raises:
        ConfigError: there is none, or the model has no maximum context.
    """
    if (reason := why_not_plain(config)) is not None:
        raise ConfigError(f"no architecture of GGUF has {reason}; {_INSTEAD}")
    known = plain_class(config)
    if known.hidden_act != _ACTIVATIONS[known.model_type]:
        raise ConfigError(f"no architecture of GGUF has the feed-forward {config.mlp}; {_INSTEAD}")
    if config.max_seq_len is None:
        raise ConfigError("model.max_seq_len: is null, and GGUF needs the maximum context; set it")
    return known.model_type


def write_gguf(
    path: Path, model: Transformer, tokenizer: Tokenizer | None, dtype: GgufType | Literal["q8_0"] = "float32"
) -> GgufFile:
    """Write ``model`` and ``tokenizer`` to ``path``; matrices in ``dtype``, norms in float32.

    Without a tokenizer, programs that read the file take and return token ids alone.

    Raises:
        ConfigError: GGUF cannot express the model, or a weight is too large for float16.
        TokenizerError: GGUF cannot express the tokenizer; the message names the setting.
        OSError: the file cannot be written.
    """
    require_gguf()
    gguf = _gguf()
    architecture = gguf_architecture(model.config)
    described = GgufTokenizer({"tokenizer_model": "none"})
    if tokenizer is not None:
        described = gguf_tokenizer(tokenizer, model.config.vocab_size or 0)
    tensor_type, file_type = _TYPE_NAMES[dtype]
    writer = gguf.GGUFWriter(path, architecture)
    try:
        _add_settings(writer, model.config)
        writer.add_file_type(gguf.LlamaFileType[file_type])
        for name, value in described.fields.items():
            getattr(writer, f"add_{name}")(value)
        for name, tensor in gguf_tensors(model):
            is_matrix = tensor.ndim == 2
            kind = gguf.GGMLQuantizationType[tensor_type if is_matrix else "F32"]
            if is_matrix and dtype == Q8_0:
                writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
                continue
            stored = _in_type(name, tensor, _TORCH_TYPES[dtype] if is_matrix else torch.float32)
            # NumPy has no bfloat16: the bytes of each row are passed on.
            writer.add_tensor(name, stored.contiguous().view(torch.uint8).numpy(), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return GgufFile(architecture, described.notices)


def _add_settings(writer: Any, config: ModelConfig) -> None:
    head_dim = config.d_model // config.n_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_mlp)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_theta)


def gguf_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Yield the name in GGUF and the float32 tensor of each parameter, residual scales folded."""
    gguf, config = _gguf(), model.config
    architecture = gguf_architecture(config)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.n_layers)
    for theirs, tensor in plain_tensors(model.state_dict(), torch.float32):
        name = names.get_name(theirs, try_suffixes=(".weight",))
        assert name is not None, theirs
        if architecture in _PAIRED_ROPE:
            if theirs.endswith("q_proj.weight"):
                tensor = pair_rotated_rows(tensor, config.n_heads)
            elif theirs.endswith("k_proj.weight"):
                tensor = pair_rotated_rows(tensor, config.n_kv_heads or config.n_heads)
        yield name, tensor


def rounded_model(model: Transformer, dtype: GgufType) -> Transformer:
    """Return the float32 model that a file of ``dtype`` describes: scales folded, matrices rounded."""
    rounded = build_model(model.config.model_copy(update={"residual_scale": False}), device="meta")
    state = {
        str(our_name(name)): tensor.to(_TORCH_TYPES[dtype]).float() if tensor.ndim == 2 else tensor
        for name, tensor in plain_tensors(model.state_dict(), torch.float32)
    }
    rounded.load_state_dict(state, assign=True)
    return rounded.eval()


def pair_rotated_rows(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of a (H K, D) projection so that features i and i + K/2 of each head become neighbours."""
    n_rows, n_inputs = weight.shape
    return weight.view(n_heads, 2, n_rows // n_heads // 2, n_inputs).transpose(1, 2).reshape(n_rows, n_inputs)


def _in_type(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    stored = tensor.to(dtype)
    if dtype == torch.float16 and bool(stored.isinf().any()):
        raise ConfigError(f"{name} has weights beyond 65,504, the largest number of float16; use --dtype bfloat16")
    return stored

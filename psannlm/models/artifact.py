"""Model files: weights, configuration and tokenizer in one safetensors file. Safe to load from anyone: no pickle."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from psannlm.config.model import ModelConfig
from psannlm.errors import ArtifactError, ConfigError, TokenizerError
from psannlm.io.limits import HASHED_FIRST_BYTES, describe_memory, machine_memory_bytes
from psannlm.models.registry import build_model, resolve
from psannlm.models.tensorfile import read_head, read_tensors, same_shapes, stored_bytes, write_tensors
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import tokenizer_from_bytes

FORMAT = "psannlm-model"
# 2: the short convolutions of a block are `attention_conv` and `mlp_conv`; they were `attention_wave` and `mlp_wave`.
FORMAT_VERSION = 2
_READABLE_VERSIONS = ("1", str(FORMAT_VERSION))
_FORMER_PARTS = {"attention_wave": "attention_conv", "mlp_wave": "mlp_conv"}
MODEL_FILE = "model.safetensors"
# Note of a model that was trained with data.isolate_documents.
ISOLATED_NOTE = "isolate_documents"
T = TypeVar("T")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LoadedModel:
    """A model loaded from a file, its tokenizer if the file has one, and the notes of its writer (step, losses)."""

    model: Transformer
    tokenizer: Tokenizer | None
    notes: dict[str, Any] = field(default_factory=dict)


def present_names(path: Path, entries: Mapping[str, T], metadata: Mapping[str, str]) -> dict[str, T]:
    """Return the entries of a model or optimizer file at ``path`` under the parameter names of this version.

    A file of format version 1, or of no version, has the names of November 2026.

    Raises:
        ArtifactError: the file has a parameter under both of its names.
    """
    if metadata.get("format_version", "1") != "1":
        return dict(entries)
    renamed = {".".join(_FORMER_PARTS.get(part, part) for part in name.split(".")): e for name, e in entries.items()}
    if len(renamed) < len(entries):
        raise ArtifactError(f"{path} holds a parameter under its former and under its present name")
    return renamed


def model_file(path: Path) -> Path:
    """Return ``path``, or the ``model.safetensors`` in it where it is a folder."""
    return path / MODEL_FILE if path.is_dir() else path


def save_model(
    path: Path,
    model: Transformer,
    tokenizer: Tokenizer | None,
    notes: dict[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> str:
    """Write one model file atomically and return its SHA-256.

    Args:
        notes: plain JSON that goes into the file.
        tensors: weights to write instead of those of ``model``, with the same names and shapes.

    Raises:
        StorageError: the file cannot be written; a previous file at ``path`` is unchanged.
    """
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": model.config.model_dump_json(),
        "notes": json.dumps(notes or {}),
    }
    if tokenizer is not None:
        metadata["tokenizer"] = base64.b64encode(tokenizer.to_bytes()).decode("ascii")
        metadata["tokenizer_fingerprint"] = tokenizer.fingerprint
    return write_tensors(path, model.state_dict() if tensors is None else tensors, metadata)


def load_model(path: Path | str) -> LoadedModel:
    """Read a model file, or the model file of a checkpoint folder, onto the CPU in evaluation mode.

    Raises:
        ArtifactError: the file is missing, damaged, of another format version, or does not fit its own configuration.
    """
    path = Path(path)
    if path.is_dir():
        path = path / MODEL_FILE
    refuse_oversize_file(path)
    content = read_tensors(path)
    _refuse_other_version(path, content.metadata)
    tensors = present_names(path, content.tensors, content.metadata)
    try:
        config = ModelConfig.model_validate_json(content.metadata["config"])
        notes = json.loads(content.metadata["notes"])
        tokenizer = _read_tokenizer(path, content.metadata)
        if not isinstance(notes, dict) or resolve(config) != config:
            raise ValueError("its notes are not a JSON object, or its configuration is not resolved")
    except (KeyError, ValidationError, ConfigError, ValueError, RecursionError, TokenizerError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{path} does not describe a model this version can build: {reason:.300}") from error
    # A hostile configuration could require any amount of memory: shapes are compared before anything is allocated.
    if config.n_layers > len(tensors):
        raise ArtifactError(f"{path} is configured with {config.n_layers} layers and holds only {len(tensors)} tensors")
    try:
        model = build_model(config, device="meta")
    except (RuntimeError, OverflowError, TypeError) as error:  # torch on sizes beyond 64 bits
        raise ArtifactError(f"{path} describes a model of impossible size") from error
    if difference := same_shapes(tensors, {name: t.shape for name, t in model.state_dict().items()}):
        raise ArtifactError(f"{path} does not fit its own configuration: {difference}")
    if odd := [name for name, t in tensors.items() if t.dtype not in _FLOATS]:
        raise ArtifactError(f"{path}: {odd[0]} is {tensors[odd[0]].dtype}, not a floating-point tensor")
    if tokenizer is not None and tokenizer.vocab_size > (config.vocab_size or 0):
        message = f"its tokenizer has {tokenizer.vocab_size} ids, its model {config.vocab_size}"
        raise ArtifactError(f"{path} does not fit together: {message}")
    model.load_state_dict(tensors, assign=True)
    return LoadedModel(model.eval(), tokenizer, notes)


def refuse_oversize_file(path: Path) -> None:
    """Check a large file by its header before it is hashed, which takes minutes, and loaded.

    Raises:
        ArtifactError: its tensors are not those of its configuration, or need more memory than the machine has.
    """
    if stored_bytes(path) <= HASHED_FIRST_BYTES:
        return
    head = read_head(path)
    _refuse_other_version(path, head.metadata)
    try:
        config = ModelConfig.model_validate_json(head.metadata["config"])
    except (KeyError, ValidationError, ConfigError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{path} does not describe a model this version can build: {reason:.300}") from error
    shapes = present_names(path, head.shapes, head.metadata)
    embedding = shapes.get("embedding.weight")
    if embedding != (config.vocab_size, config.d_model) or config.n_layers > len(shapes):
        raise ArtifactError(f"{path} does not fit its own configuration: {embedding} is not the shape of its embedding")
    try:
        state = build_model(config, device="meta").state_dict()
    except (RuntimeError, OverflowError, TypeError) as error:  # torch on sizes beyond 64 bits
        raise ArtifactError(f"{path} describes a model of impossible size") from error
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if odd := sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name)):
        raise ArtifactError(
            f"{path} does not fit its own configuration: {odd[0]!r:.80} is not a tensor of the model, or has another "
            "shape"
        )
    memory = machine_memory_bytes()
    if memory is not None and head.n_bytes > memory:
        raise ArtifactError(f"{path} holds {head.n_bytes / 1e9:,.1f} GB of tensors, and {describe_memory()}")


def _refuse_other_version(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ArtifactError(f"{path} is not a model file of psannlm (format: {metadata.get('format', 'none')})")
    version = metadata.get("format_version")
    if version not in _READABLE_VERSIONS:
        message = f"{path} has format version {version}, this psannlm reads {' and '.join(_READABLE_VERSIONS)}"
        raise ArtifactError(f"{message}; install the psannlm that wrote it, or save the model again")


def _read_tokenizer(path: Path, metadata: dict[str, str]) -> Tokenizer | None:
    if "tokenizer" not in metadata:
        return None
    try:
        content = base64.b64decode(metadata["tokenizer"], validate=True)
    except binascii.Error as error:
        raise ArtifactError(f"{path}: its tokenizer is not base64") from error
    tokenizer = tokenizer_from_bytes(content)
    if tokenizer.fingerprint != metadata.get("tokenizer_fingerprint"):
        recorded = metadata.get("tokenizer_fingerprint")
        raise ArtifactError(f"{path}: its tokenizer's fingerprint is {tokenizer.fingerprint}, recorded is {recorded}")
    return tokenizer

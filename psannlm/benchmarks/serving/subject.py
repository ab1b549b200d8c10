"""The model that is served: its file, its exports for reference servers, and prompts for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from psannlm.benchmarks.harness.random_weights import randomize_parameters
from psannlm.config.model import ModelConfig
from psannlm.data.corpus.documents import builtin_documents
from psannlm.errors import ConfigError
from psannlm.models.accounting import Place, refuse_oversize
from psannlm.models.artifact import load_model, model_file, save_model
from psannlm.models.registry import build_model, resolve
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import fit_tokenizer

# The smallest context of a model of random weights, in tokens.
_CONTEXT = 256


@dataclass(frozen=True)
class Subject:
    """A model file that all servers load.

    Attributes:
        file: of the model, with its tokenizer.
        weights: where the weights come from.
        parameters: number of them.
    """

    file: Path
    config: ModelConfig
    tokenizer: Tokenizer
    weights: str
    parameters: int


def build_subject(config: ModelConfig, n_tokens: int, seed: int, folder: Path) -> Subject:
    """Write a model of random weights to ``folder``, with a byte-level BPE tokenizer fitted on Python's reference.

    Byte-level BPE, because every reference server reads it.

    Args:
        n_tokens: shortest context of the model, in tokens.

    Raises:
        ConfigError: the model is too large for the machine.
        CorpusError: this Python came without its language reference.
    """
    texts = [document.text for document in builtin_documents()]
    tokenizer = fit_tokenizer(texts, "tokenizers", config.vocab_size or 0)
    resolved = resolve(config.model_copy(update={"max_seq_len": max(_CONTEXT, n_tokens)}))
    refuse_oversize(resolved, resolved.vocab_size or 1, Place(for_training=False))
    model = build_model(resolved, seed=seed).eval()
    randomize_parameters(model, seed)
    file = folder / "model.safetensors"
    save_model(file, model, tokenizer)
    return Subject(file, resolved, tokenizer, "random", sum(parameter.numel() for parameter in model.parameters()))


def read_subject(path: Path, n_tokens: int) -> Subject:
    """Return the model at ``path`` as the subject of a benchmark.

    Raises:
        ArtifactError: it is missing or damaged, or has no tokenizer.
        ConfigError: its context is shorter than ``n_tokens``.
    """
    from psannlm.export.hf import require_tokenizer

    loaded = load_model(path)
    config, tokenizer = loaded.model.config, require_tokenizer(loaded)
    limit = None if config.positional_encoding == "alibi" else config.max_seq_len
    if limit is not None and n_tokens > limit:
        raise ConfigError(
            f"prompts and new tokens of {n_tokens:,} exceed the model's context of {limit:,}; lower --prompt-tokens or "
            "--new-tokens"
        )
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    return Subject(model_file(path), config, tokenizer, str(path), parameters)


def export_folder(subject: Subject, folder: Path) -> Path:
    """Write the folder of transformers with the same weights. Raises the errors of :func:`export_hf`."""
    from psannlm.export.export import ExportSettings, export_hf

    export_hf(subject.file, folder, ExportSettings(dtype="float32", is_verified=False))
    return folder


def export_gguf_file(subject: Subject, folder: Path, dtype: str) -> Path:
    """Write the GGUF file with the same weights in ``dtype``. Raises the errors of :func:`export_gguf`."""
    from psannlm.export.export import ExportSettings
    from psannlm.export.export_gguf import GGUF_NAME, export_gguf

    export_gguf(subject.file, folder, ExportSettings(dtype=dtype, is_verified=False))
    return folder / GGUF_NAME

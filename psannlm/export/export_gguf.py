"""Export of a checkpoint as a GGUF file: write it in a folder, verify it there, publish the folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from psannlm.errors import ConfigError
from psannlm.export.export import ExportSettings
from psannlm.export.folder import new_folder, require_place
from psannlm.export.gguf import GgufFile, GgufType, gguf_architecture, require_gguf, rounded_model, write_gguf
from psannlm.export.gguf_verify import GgufVerification, readers_for, verify_gguf
from psannlm.export.held_out import verification_text
from psannlm.export.hf import Loader, require_tokenizer
from psannlm.models.artifact import load_model
from psannlm.runtime.progress import OnProgress, Progress, ignore_progress

GGUF_NAME = "model.gguf"


@dataclass(frozen=True)
class GgufResult:
    """An exported file: its folder, the architecture, who can load it, and what was compared."""

    folder: Path
    file: GgufFile
    loaders: list[Loader]
    verification: GgufVerification | None

    @property
    def architecture(self) -> str:
        """The architecture that llama.cpp computes the file with."""
        return self.file.architecture

    @property
    def notices(self) -> tuple[str, ...]:
        """What differs in use, one sentence each."""
        return self.file.notices

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "folder": str(self.folder),
            "file": str(self.folder / GGUF_NAME),
            "architecture": self.file.architecture,
            "notices": list(self.file.notices),
            "loaders": {loader.name: {"able": loader.is_able, "reason": loader.reason} for loader in self.loaders},
            "verification": None if self.verification is None else asdict(self.verification),
        }


def export_gguf(
    checkpoint: Path, out: Path, settings: ExportSettings, on_progress: OnProgress = ignore_progress
) -> GgufResult:
    """Write the model at ``checkpoint`` as ``model.gguf`` in the folder ``out``.

    Args:
        checkpoint: a model file or a checkpoint folder.
        settings: ``dtype`` None means float32; shards and custom code are for transformers.
        on_progress: called at the beginning of each stage.

    Raises:
        ArtifactError: the checkpoint is missing or damaged, or has no tokenizer.
        ConfigError: GGUF cannot express the model, ``out`` is not empty, or a package is not installed.
        TokenizerError: GGUF cannot express the tokenizer; the message names the part.
        VerificationFailed: a program that reads the file computes something else; nothing is left at ``out``.
        StorageError: the file cannot be written.
    """
    if settings.is_custom:
        raise ConfigError("--custom-code is for --format hf: a GGUF file holds no code")
    require_place(out, is_forced=settings.is_forced)
    require_gguf()
    on_progress(Progress("loading the checkpoint"))
    loaded = load_model(checkpoint)
    tokenizer = require_tokenizer(loaded)
    architecture = gguf_architecture(loaded.model.config)
    if settings.is_verified:
        readers_for(architecture)
    dtype: GgufType = next(name for name in get_args(GgufType) if name == (settings.dtype or "float32"))
    verification = None
    with new_folder(out, is_forced=settings.is_forced) as folder:
        on_progress(Progress(f"writing {architecture}"))
        written = write_gguf(folder / GGUF_NAME, loaded.model, tokenizer, dtype)
        if settings.is_verified:
            on_progress(Progress("verifying: reading text"))
            text = verification_text(checkpoint, tokenizer)
            reference = rounded_model(loaded.model, dtype)
            verification = verify_gguf(folder / GGUF_NAME, reference, tokenizer, architecture, dtype, text, on_progress)
    return GgufResult(out, written, gguf_loaders(architecture), verification)


def gguf_loaders(architecture: str) -> list[Loader]:
    """Return which of transformers, vLLM and llama.cpp can load a file of ``architecture``."""
    if architecture == "arcee":
        transformers = Loader("transformers", False, "it reads no GGUF of arcee; use --format hf")
    else:
        head = ", and head_dim set in the config it reads" if architecture == "qwen3" else ""
        transformers = Loader("transformers", True, f"with gguf_file={GGUF_NAME!r}{head}")
    return [
        transformers,
        Loader("vLLM", False, "not tested here; use --format hf"),
        Loader("llama.cpp", True, f"as {architecture}, and so can the programs built on it"),
    ]

"""Export of a checkpoint: load it, write the folder beside its place, verify it there, publish it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from psannlm.export.folder import new_folder, require_place
from psannlm.export.held_out import verification_text
from psannlm.export.hf import (
    DTYPES,
    Loader,
    Target,
    choose_target,
    loaders,
    reference_model,
    require_tokenizer,
    write_folder,
)
from psannlm.export.model_card import model_card
from psannlm.export.verify import Verification, require_transformers, verify_folder
from psannlm.io.atomic import write_text
from psannlm.models.artifact import load_model
from psannlm.runtime.progress import OnProgress, Progress, ignore_progress


@dataclass(frozen=True)
class ExportSettings:
    """What to write, and how.

    Attributes:
        dtype: of the weights: ``float32``, ``bfloat16`` or ``float16``; None keeps that of the checkpoint.
        max_shard_bytes: largest size of one file of weights.
        is_custom: write custom code even where a class of transformers computes the model.
        is_verified: compare the folder with the model before it is published.
        is_forced: replace an earlier export.
    """

    dtype: str | None = None
    max_shard_bytes: int = 5 * 10**9
    is_custom: bool = False
    is_verified: bool = True
    is_forced: bool = False


@dataclass(frozen=True)
class ExportResult:
    """An exported folder: the class that computes it, who can load it, and what was compared."""

    folder: Path
    target: Target
    loaders: list[Loader]
    verification: Verification | None
    notices: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        """The class that computes the folder."""
        return self.target.architecture

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "folder": str(self.folder),
            "architecture": self.target.architecture,
            "custom_code": self.target.is_custom,
            "loaders": {loader.name: {"able": loader.is_able, "reason": loader.reason} for loader in self.loaders},
            "verification": None if self.verification is None else asdict(self.verification),
        }


def export_hf(
    checkpoint: Path, out: Path, settings: ExportSettings, on_progress: OnProgress = ignore_progress
) -> ExportResult:
    """Write the model at ``checkpoint`` as a folder of transformers at ``out``.

    Args:
        checkpoint: a model file or a checkpoint folder.
        on_progress: called at the beginning of each stage.

    Raises:
        ArtifactError: the checkpoint is missing or damaged, or has no tokenizer.
        ConfigError: ``out`` is not empty, or transformers is not installed.
        TokenizerError: the tokenizer cannot be carried over; the message names the setting.
        VerificationFailed: transformers computes something else; nothing is left at ``out``.
        StorageError: the folder cannot be written.
    """
    require_place(out, is_forced=settings.is_forced)
    if settings.is_verified:
        require_transformers()
    on_progress(Progress("loading the checkpoint"))
    loaded = load_model(checkpoint)
    tokenizer = require_tokenizer(loaded)
    config = loaded.model.config
    target = choose_target(config, is_custom=settings.is_custom)
    able = loaders(config, target)
    dtype = None if settings.dtype is None else DTYPES[settings.dtype]
    verification = None
    with new_folder(out, is_forced=settings.is_forced) as folder:
        on_progress(Progress(f"writing {target.architecture}"))
        write_folder(folder, loaded, target, dtype=dtype, max_shard_bytes=settings.max_shard_bytes)
        if settings.is_verified:
            on_progress(Progress("verifying: reading text"))
            text = verification_text(checkpoint, tokenizer)
            reference = reference_model(loaded.model, target, dtype)
            verification = verify_folder(folder, reference, tokenizer, target, text, on_progress)
        card = model_card(out.name, checkpoint, loaded, target, able, verification)
        write_text(folder / "README.md", card)
    return ExportResult(out, target, able, verification)

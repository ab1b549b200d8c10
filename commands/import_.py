"""``psannlm import``: a folder of Hugging Face transformers as a model file."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from psannlm.commands.options import (
    JsonOption,
    figures_table,
    print_json,
    print_path,
    require_existing,
    stdout_console,
)

if TYPE_CHECKING:
    from psannlm.export.import_hf import ImportedModel

log = logging.getLogger(__name__)


def import_model(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Folder of transformers: config.json, safetensors files, and tokenizer.json or tokenizer.model.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Model file to write, in float32.")] = Path("model.safetensors"),
    no_tokenizer: Annotated[
        bool, typer.Option("--no-tokenizer", help="Import the weights alone; such a file cannot generate text.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file at --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a model file of a transformers folder of Llama, Qwen3 or Arcee, or of one that psannlm exported."""
    from psannlm.errors import ConfigError
    from psannlm.export.import_hf import import_folder
    from psannlm.io.atomic import require_writable

    require_existing("DIR", folder, what="folder")
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; name the folder that holds config.json")
    if os.path.lexists(out) and (out.is_dir() or not force):
        kind = "is a folder; name a file" if out.is_dir() else "exists; add --force to replace it"
        raise ConfigError(f"--out: {out} {kind}")
    require_writable(out)
    imported = import_folder(folder, with_tokenizer=not no_tokenizer)
    for notice in imported.notices:
        log.warning(f"note: {notice}")
    card = _card(imported, out, imported.save(out))
    if as_json:
        print_json(card)
        return
    stdout_console().print(figures_table("imported model", [(name, str(value)) for name, value in card.items()]))
    if imported.tokenizer is not None:
        print_path(f"next: psannlm generate --checkpoint {out} --prompt TEXT")


def _card(imported: ImportedModel, out: Path, sha256: str) -> dict[str, Any]:
    return {
        "file": str(out),
        "class": imported.architecture,
        "parameters": sum(parameter.numel() for parameter in imported.model.parameters()),
        "dtype": "float32",
        "tokenizer": None if imported.tokenizer is None else imported.tokenizer.backend,
        "vocab_size": imported.model.config.vocab_size,
        "max_seq_len": imported.model.config.max_seq_len,
        "sha256": sha256,
    }

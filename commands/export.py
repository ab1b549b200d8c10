"""psannlm export: a checkpoint as a model of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from psannlm.commands.options import (
    EmaOption,
    JsonOption,
    find_model_file,
    live_line,
    print_json,
    print_path,
    stderr_console,
)

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def size_bytes(text: str) -> int:
    """Return the bytes in ``500MB``, ``5GB`` or ``2GiB``. Raises BadParameter for anything else."""
    digits = text.rstrip("BbKkMmGgIi ")
    unit = text[len(digits) :].strip().upper()
    if not (digits.isascii() and digits.isdecimal() and int(digits) > 0) or unit not in _UNITS:
        raise typer.BadParameter(f"{text!r} is not a size; write 500MB, 5GB or 2GiB")
    return int(digits) * _UNITS[unit]


CheckpointArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT", help="Model file, checkpoint folder or run folder, of which the best checkpoint is taken."
    ),
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write; it must not exist, or be empty.")]
FormatOption = Annotated[
    Literal["hf", "gguf"],
    typer.Option(
        "--format",
        help="Format to write: hf is a folder that Hugging Face transformers loads, gguf is a folder with a model.gguf "
        "for llama.cpp (transformer base with swiglu or relu2 only).",
    ),
]
ExportDtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option("--dtype", help="Data type of the weights. Default: as stored in the checkpoint."),
]
ShardOption = Annotated[
    str,
    typer.Option(
        "--max-shard-size",
        help="Largest size of one file of weights, such as 500MB or 5GB; a larger model is written in several.",
    ),
]
CustomOption = Annotated[
    bool,
    typer.Option("--custom-code", help="Write custom code even where a class of transformers computes the model."),
]
VerifyOption = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="Load the result with transformers in a fresh process and compare logits, greedy text and token ids; a "
        "difference is exit code 3, and nothing is left behind.",
    ),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace an earlier export at --out; other files are never replaced.")
]


def export(
    checkpoint: CheckpointArgument,
    out: OutOption,
    ema: EmaOption = False,
    format: FormatOption = "hf",
    dtype: ExportDtypeOption = None,
    max_shard_size: ShardOption = "5GB",
    custom_code: CustomOption = False,
    is_verified: VerifyOption = True,
    is_forced: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder or a GGUF file, and verify it in the programs that load it."""
    from psannlm.export.export import ExportSettings, export_hf
    from psannlm.export.export_gguf import export_gguf

    settings = ExportSettings(
        dtype=dtype,
        max_shard_bytes=size_bytes(max_shard_size),
        is_custom=custom_code,
        is_verified=is_verified,
        is_forced=is_forced,
    )
    path = find_model_file(checkpoint, checkpoint, hint="CHECKPOINT", ema=ema)
    with live_line(stderr_console()) as line:
        result = (export_hf if format == "hf" else export_gguf)(path, out, settings, line.show)
    if as_json:
        print_json(result.as_dict())
        return
    print_path(f"written to {out} as {result.architecture}")
    for notice in result.notices:
        print_path(f"note: {notice}")
    if result.verification is None:
        print_path("not verified (--no-verify)")
    else:
        print_path(f"verified: {result.verification}")
        print_path(f"compared on {result.verification.text}")
    for loader in result.loaders:
        print_path(f"  {loader}")

"""psannlm eval: loss, perplexity and bits per byte of a checkpoint on files of text."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from psannlm.commands.options import (
    DEFAULT_RUNS,
    CheckpointOption,
    DeviceOption,
    DtypeOption,
    ErrorsOption,
    JsonOption,
    RunsOption,
    figures_table,
    find_model_file,
    live_line,
    naming_options,
    print_json,
    stderr_console,
    stdout_console,
    write_artifact,
)

if TYPE_CHECKING:
    from psannlm.data.corpus.documents import ReadReport
    from psannlm.evaluation.loss import Evaluation


FilesArgument = Annotated[
    list[str], typer.Argument(metavar="FILE...", help="Files, folders or globs of text to evaluate on.")
]
PerLineOption = Annotated[
    bool,
    typer.Option("--per-line", help="Treat each line of a .txt file as a document. Default: the file is one document."),
]
WindowOption = Annotated[
    int | None,
    typer.Option(min=1, help="Length of an evaluation window in tokens. Default: the window length of training."),
]
AmpOption = Annotated[str, typer.Option(help="Precision of matrix products under autocast: auto, bf16, fp16 or fp32.")]


def evaluate(
    files: FilesArgument,
    checkpoint: CheckpointOption = None,
    runs: RunsOption = DEFAULT_RUNS,
    per_line: PerLineOption = False,
    text_key: Annotated[str, typer.Option(help="Key that holds the text in .jsonl and .parquet files.")] = "text",
    errors: ErrorsOption = "strict",
    window: WindowOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 16,
    amp: AmpOption = "fp32",
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write to. Default: reports/eval/<time>.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure loss, perplexity and bits per byte of a model on a text."""
    from psannlm.config.data import PathSource
    from psannlm.config.run import section_from_kwargs
    from psannlm.config.train import TrainConfig
    from psannlm.evaluation.loss import evaluate_sources
    from psannlm.generation.quantize import prepare_for_inference
    from psannlm.io.run_metadata import new_folder, require_folder
    from psannlm.models.artifact import load_model
    from psannlm.reports.schemas.evaluation import EvaluationMetrics
    from psannlm.runtime.device import pick_device, pick_precision

    with naming_options("train"):
        settings = section_from_kwargs(TrainConfig, "train", {"amp": amp, "device": device})
    require_folder("eval", out)
    path = find_model_file(checkpoint, runs)
    loaded = load_model(path)
    precision = pick_precision(settings.amp, pick_device(settings.device))
    loaded.model.to(precision.device)
    if dtype != "float32":
        if settings.amp != "fp32":
            raise typer.BadParameter(f"{dtype} weights determine the precision; leave out --amp", param_hint="--dtype")
        loaded = replace(loaded, model=prepare_for_inference(loaded.model, dtype))
    began = time.monotonic()

    def progress_text(done: int, total: int) -> str:
        elapsed = time.monotonic() - began
        left = timedelta(seconds=round(elapsed * (total - done) / done))
        return f"evaluating: {done:,} of {total:,} windows, {done / elapsed:,.1f} windows/s, {left} left"

    with live_line(stderr_console()) as line:
        result, report = evaluate_sources(
            loaded,
            [PathSource(path=file, per_line=per_line, text_key=text_key, errors=errors) for file in files],
            replace_option="--errors replace",
            precision=precision,
            batch_size=batch_size,
            window=window,
            on_progress=lambda done, total: line.show(progress_text(done, total)),
        )
        for text in report.lines():
            line.keep(text)
    metrics = EvaluationMetrics(
        checkpoint=str(path), dtype=dtype, files=files, corpus_sha256=report.sha256, **result.as_dict()
    ).as_dict()
    rows = _result_rows(f"{path}, {dtype} weights", result, report)
    folder: Path | None = None
    try:
        folder = new_folder("eval", out)
        rows.append(("written to", str(folder)))
        write_artifact(folder, metrics, [figures_table("evaluation", rows)])
    finally:
        # Print the result even where it cannot be written, such as on a full disk.
        if as_json:
            print_json({**metrics, "folder": None if folder is None else str(folder)})
        else:
            stdout_console().print(figures_table("evaluation", rows))


def _result_rows(model: str, result: Evaluation, report: ReadReport) -> list[tuple[str, str]]:
    from psannlm.tokenizers.roundtrip import LOSSY

    documents = f"{report.documents:,} document{'' if report.documents == 1 else 's'}"
    return [
        ("checkpoint", model),
        ("text", f"{documents}, {result.n_bytes:,} bytes, {result.n_labels:,} tokens"),
        ("loss", f"{result.loss:.4f} nats per token"),
        ("perplexity", f"{result.perplexity:.2f}"),
        ("bits per byte", f"{result.bits_per_byte:.4f}{LOSSY if result.lossy_tokenizer else ''}"),
    ]

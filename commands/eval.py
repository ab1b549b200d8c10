"""psannlm eval: loss, perplexity and bits per byte of a checkpoint on files of text, or its scores on tasks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from psannlm.commands.options import (
    DEFAULT_RUNS,
    CheckpointOption,
    DeviceOption,
    DtypeOption,
    EmaOption,
    ErrorsOption,
    JsonOption,
    LiveLine,
    PerLineOption,
    RunsOption,
    TextKeyOption,
    WeightDtype,
    columns_table,
    figures_table,
    find_model_file,
    live_line,
    naming_options,
    print_json,
    publish,
    require_existing,
    stderr_console,
    stdout_console,
    write_artifact,
)

if TYPE_CHECKING:
    from rich.table import Table

    from psannlm.config.data import PathSource
    from psannlm.data.corpus.documents import ReadReport
    from psannlm.evaluation.activation_quantization import QuantizationSettings
    from psannlm.evaluation.loss import Evaluation, EvaluationText
    from psannlm.evaluation.tasks.score import TaskScore
    from psannlm.evaluation.tasks.suite import Comparison, TaskSettings
    from psannlm.models.artifact import LoadedModel
    from psannlm.reports.schemas.evaluation import DocumentComparison
    from psannlm.runtime.device import Precision

log = logging.getLogger(__name__)

# The kind of artifact folder that tasks write, reports/tasks/<time>.
TASKS_KIND = "tasks"

FilesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FILE",
        help="Files, folders or globs of text to evaluate on; with --tasks only for psannlm_last_word.",
    ),
]
TasksOption = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        metavar="NAME,...",
        help="Score the model on these tasks instead of measuring its loss: task packs of psannlm (psannlm_agreement, "
        "psannlm_negation, psannlm_number or all three as psannlm_pairs; psannlm_modular_addition, psannlm_parity, "
        "psannlm_copying or all three as psannlm_algorithmic; psannlm_last_word) and tasks of lm-evaluation-harness "
        "(extra eval).",
    ),
]
FewshotOption = Annotated[
    int | None,
    typer.Option(
        "--num-fewshot",
        metavar="K",
        min=0,
        help="Solved examples before each question of a task of lm-eval. Default: what the task sets.",
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", min=1, help="Most questions of each task. Default: all of them."),
]
TasksDirOption = Annotated[
    Path | None, typer.Option("--tasks-dir", metavar="DIR", help="Folder with further tasks, as YAML files of lm-eval.")
]
DownloadOption = Annotated[
    bool,
    typer.Option(
        "--allow-download",
        help="Fetch data sets of tasks from the Hugging Face hub. Default: make no connection.",
    ),
]
BaselineOption = Annotated[
    Path | None,
    typer.Option(
        "--baseline",
        metavar="PATH",
        help="Checkpoint to compare with on the same documents, or the same questions of --tasks: the difference with "
        "its 95 % interval. On tasks, a model is called better or worse only if the interval excludes zero.",
    ),
]
SeedOption = Annotated[
    int, typer.Option(min=0, help="Seed of the documents that the bootstrap of --baseline draws (default 0).")
]
ActivationBitsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--activations-bits",
        metavar="N,...",
        help="Also measure the loss with the inputs of matrix products rounded to integers of N bits (2 to 16), static "
        "and dynamic, such as 8,6,4; may be repeated. Weights stay as they are. Default: not measured.",
    ),
]
ActivationPlacesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--activations-places",
        metavar="NAME,...",
        help="Inputs that --activations-bits rounds: qkv, attention_output, gate_up, down, head, and qkv_features in a "
        "model that has them; may be repeated. Default: all of them.",
    ),
]
CalibrationTokensOption = Annotated[
    int | None,
    typer.Option(
        "--activations-calibration-tokens",
        metavar="N",
        min=1,
        help="Tokens, spread over the text, that determine the static scales of --activations-bits and are not "
        "scored with it, rounded up to whole windows. Default: 16384, at most a quarter of the text.",
    ),
]
WindowOption = Annotated[
    int | None,
    typer.Option(min=1, help="Length of an evaluation window in tokens. Default: the window length of training."),
]
IsolateOption = Annotated[
    bool | None,
    typer.Option(
        "--isolate-documents/--no-isolate-documents",
        help="Keep the documents of a window apart, so that none is context of the next. Default: as in training.",
    ),
]
AmpOption = Annotated[str, typer.Option(help="Precision of matrix products under autocast: auto, bf16, fp16 or fp32.")]


def evaluate(
    files: FilesArgument = None,
    checkpoint: CheckpointOption = None,
    runs: RunsOption = DEFAULT_RUNS,
    ema: EmaOption = False,
    per_line: PerLineOption = False,
    text_key: TextKeyOption = "text",
    errors: ErrorsOption = "strict",
    window: WindowOption = None,
    isolate_documents: IsolateOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows, or answers to score, per forward pass.")] = 16,
    amp: AmpOption = "fp32",
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    tasks: TasksOption = None,
    num_fewshot: FewshotOption = None,
    limit: LimitOption = None,
    tasks_dir: TasksDirOption = None,
    allow_download: DownloadOption = False,
    baseline: BaselineOption = None,
    seed: SeedOption = 0,
    activations_bits: ActivationBitsOption = None,
    activations_places: ActivationPlacesOption = None,
    activations_calibration_tokens: CalibrationTokensOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write to. Default: reports/eval/<time>, or reports/tasks/<time>."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure loss, perplexity and bits per byte of a model on a text, or its scores on tasks."""
    from psannlm.config.data import PathSource

    sources = [PathSource(path=file, per_line=per_line, text_key=text_key, errors=errors) for file in files or ()]
    where = partial(find_model_file, checkpoint, runs, ema=ema)
    quantization = _quantization(
        activations_bits,
        activations_places,
        activations_calibration_tokens,
        {"--tasks": tasks is not None, "--baseline": baseline is not None, "--dtype": dtype != "float32"},
    )
    if tasks is not None:
        from psannlm.evaluation.tasks.suite import TaskSettings

        if isolate_documents is not None:
            raise typer.BadParameter("it does not go with --tasks", param_hint="--isolate-documents")
        if window is not None or amp != "fp32":
            raise typer.BadParameter("it does not go with --tasks", param_hint="--window" if window else "--amp")
        if tasks_dir is not None:
            require_existing("--tasks-dir", tasks_dir, what="folder")
        task_settings = TaskSettings(
            num_fewshot=num_fewshot, limit=limit, tasks_dir=tasks_dir, allow_download=allow_download
        )
        run = _TaskRun(sources, task_settings, dtype, device, batch_size)
        _score_tasks(tasks.split(","), run, where, baseline, out, as_json)
        return
    _refuse_task_options(num_fewshot=num_fewshot, limit=limit, tasks_dir=tasks_dir)
    if not sources:
        raise typer.BadParameter("name files to evaluate on, or tasks with --tasks", param_hint="FILE")
    loss_run = _LossRun(sources, window, isolate_documents, batch_size, amp, dtype, device, quantization)
    _measure_loss(loss_run, where=where, baseline=baseline, seed=seed, out=out, as_json=as_json)


def _quantization(
    bits: list[str] | None, places: list[str] | None, calibration_tokens: int | None, refused: dict[str, bool]
) -> QuantizationSettings | None:
    """Return the settings of --activations-bits, which goes with none of ``refused`` that was given."""
    if bits is None:
        for name, value in (("--activations-places", places), ("--activations-calibration-tokens", calibration_tokens)):
            if value is not None:
                raise typer.BadParameter("it needs --activations-bits", param_hint=name)
        return None
    for name, is_given in refused.items():
        if is_given:
            raise typer.BadParameter("it does not go with --activations-bits", param_hint=name)
    from psannlm.evaluation.activation_quantization import QuantizationSettings

    return QuantizationSettings.parse(bits, places, calibration_tokens)


@dataclass(frozen=True)
class _LossRun:
    """How a text is read and evaluated, with every model alike."""

    sources: list[PathSource]
    window: int | None
    isolate_documents: bool | None
    batch_size: int
    amp: str
    dtype: WeightDtype
    device: str
    quantization: QuantizationSettings | None = None

    @cached_property
    def precision(self) -> Precision:
        from psannlm.config.run import section_from_kwargs
        from psannlm.config.train import TrainConfig
        from psannlm.runtime.device import pick_device, pick_precision

        with naming_options("train"):
            settings = section_from_kwargs(TrainConfig, "train", {"amp": self.amp, "device": self.device})
        if self.dtype != "float32" and settings.amp != "fp32":
            raise typer.BadParameter(
                f"{self.dtype} weights determine the precision; leave out --amp", param_hint="--dtype"
            )
        return pick_precision(settings.amp, pick_device(settings.device, takes_mps=self.dtype == "float32"))

    def open(self, path: Path, line: LiveLine) -> tuple[LoadedModel, EvaluationText]:
        """Load a model and read the text as windows for it."""
        from psannlm.evaluation.loss import read_windows
        from psannlm.generation.quantize import prepare_for_inference
        from psannlm.models.artifact import load_model

        loaded = load_model(path)
        loaded.model.to(self.precision.device)
        if self.dtype != "float32":
            loaded = replace(loaded, model=prepare_for_inference(loaded.model, self.dtype))
        text = read_windows(
            loaded,
            self.sources,
            precision=self.precision,
            batch_size=self.batch_size,
            window=self.window,
            isolate_documents=self.isolate_documents,
            replace_option="--errors replace",
            on_progress=line.show,
        )
        return loaded, text


def _measure_loss(
    run: _LossRun, *, where: Callable[[], Path], baseline: Path | None, seed: int, out: Path | None, as_json: bool
) -> None:
    """Print and write the loss of a model on a text, the difference to the baseline, and quantized losses."""
    from psannlm.evaluation.activation_quantization import evaluate_quantized
    from psannlm.evaluation.loss import evaluate
    from psannlm.io.run_metadata import new_folder, require_folder
    from psannlm.reports.schemas.evaluation import ActivationFigures, EvaluationMetrics
    from psannlm.reports.tables.activations import quantization_tables

    precision = run.precision
    require_folder("eval", out)
    path = where()
    other = None if baseline is None else find_model_file(baseline, baseline, hint="--baseline")
    with live_line(stderr_console()) as line:
        loaded, text = run.open(path, line)
        activations = None
        if run.quantization is not None:
            activations = evaluate_quantized(
                loaded.model,
                text.windows,
                run.quantization,
                precision=precision,
                batch_size=run.batch_size,
                on_progress=line.show,
            )
        found = evaluate(
            loaded.model, text.windows, precision=precision, batch_size=run.batch_size, on_progress=line.show
        )
        result = replace(found, lost_fraction=text.lost_fraction)
        for message in text.report.lines():
            log.info(message)
        comparison = None if other is None else _compare_documents(run, (loaded, text), other, seed, line)
    metrics = EvaluationMetrics(
        checkpoint=str(path),
        dtype=run.dtype,
        files=[source.path for source in run.sources],
        corpus_sha256=text.report.sha256,
        **result.as_dict(),
        comparison=comparison,
        activations=None if activations is None else ActivationFigures(**asdict(activations)),
    ).as_dict()
    rows = _result_rows(f"{path}, {run.dtype} weights", result, text.report)
    rows += [] if comparison is None else _comparison_rows(comparison)
    described = [] if activations is None else quantization_tables(activations)
    more = [columns_table(table.title, table.headings, table.rows) for table in described]
    folder: Path | None = None
    try:
        folder = new_folder("eval", out)
        rows.append(("written to", str(folder)))
        write_artifact(folder, metrics, [figures_table("evaluation", rows), *more])
    finally:
        # Print the result even where it cannot be written, such as on a full disk.
        if as_json:
            print_json({**metrics, "folder": None if folder is None else str(folder)})
        else:
            stdout_console().print(figures_table("evaluation", rows), *more)


def _compare_documents(
    run: _LossRun, ours: tuple[LoadedModel, EvaluationText], other: Path, seed: int, line: LiveLine
) -> DocumentComparison:
    """Return the difference of a model's loss to that of the model file ``other``, with its interval over documents."""
    from psannlm.errors import TokenizerError
    from psannlm.evaluation.documents import N_RESAMPLES, bootstrap_difference, evaluate_documents
    from psannlm.reports.schemas.evaluation import DocumentComparison

    loaded, text = run.open(other, line)
    fingerprints = [None if each.tokenizer is None else each.tokenizer.fingerprint for each in (ours[0], loaded)]
    if fingerprints[0] != fingerprints[1]:
        raise TokenizerError(
            f"--baseline {other} has another tokenizer, so that losses per token cannot be compared; evaluate both "
            "alone and compare bits per byte"
        )
    mine, theirs = (
        evaluate_documents(
            each.model, here.windows, precision=run.precision, batch_size=run.batch_size, on_progress=line.show
        )
        for each, here in (ours, (loaded, text))
    )
    found = bootstrap_difference([mine], [theirs], seed=seed)
    return DocumentComparison(
        checkpoint=str(other), loss=theirs.loss(), **asdict(found), n_resamples=N_RESAMPLES, seed=seed
    )


def _comparison_rows(found: DocumentComparison) -> list[tuple[str, str]]:
    interval = "no interval: one document"
    if found.low is not None and found.high is not None:
        interval = (
            f"95 % interval {found.low:+.4f} to {found.high:+.4f}, bootstrap over {found.n_documents:,} documents"
        )
    return [
        ("baseline", f"{found.checkpoint}: {found.loss:.4f} nats per token"),
        ("difference", f"{found.mean:+.4f} nats per token; {interval}"),
    ]


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


@dataclass(frozen=True)
class _TaskRun:
    """How tasks are asked, of every model alike."""

    sources: list[PathSource]
    settings: TaskSettings
    dtype: WeightDtype
    device: str
    batch_size: int

    def score(self, path: Path, names: list[str], line: LiveLine) -> tuple[list[TaskScore], dict[str, Any]]:
        """Return a model's scores, and figures about the model and its answers."""
        from psannlm.errors import ArtifactError
        from psannlm.evaluation.loss import read_texts
        from psannlm.evaluation.tasks.suite import run_tasks
        from psannlm.generation.engine import Engine
        from psannlm.generation.scoring import Scorer
        from psannlm.models.artifact import load_model
        from psannlm.runtime.device import pick_device

        loaded = load_model(path)
        if loaded.tokenizer is None:
            raise ArtifactError(f"{path} has no tokenizer, which tasks need")
        loaded.model.to(pick_device(self.device))
        scorer = Scorer(Engine(loaded.model, dtype=self.dtype), self.batch_size)
        scores = run_tasks(
            names,
            scorer,
            loaded.tokenizer,
            self.settings,
            texts=read_texts(self.sources, loaded.tokenizer, replace_option="--errors replace"),
            on_progress=line.show,
        )
        about = {"checkpoint": str(path), "tokenizer": loaded.tokenizer.fingerprint, "truncated": scorer.n_truncated}
        return scores, about


def _score_tasks(
    tasks: list[str],
    run: _TaskRun,
    where: Callable[[], Path],
    baseline: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Print and write the scores of a model on tasks, compared with those of the baseline."""
    from psannlm.evaluation.tasks.suite import compare_scores, require_tasks
    from psannlm.io.run_metadata import require_folder

    names = require_tasks([task.strip() for task in tasks], run.settings, has_text=bool(run.sources))
    require_folder(TASKS_KIND, out)
    path = where()
    other = None if baseline is None else find_model_file(baseline, baseline, hint="--baseline")
    with live_line(stderr_console()) as line:
        scores, about = run.score(path, names, line)
        figures: dict[str, Any] = {
            **about,
            "dtype": run.dtype,
            "num_fewshot": run.settings.num_fewshot,
            "limit": run.settings.limit,
            "seed": run.settings.seed,
            "tasks": [score.as_dict() for score in scores],
        }
        tables = [_score_table(f"{path}, {run.dtype} weights", scores)]
        if other is not None:
            others, about_other = run.score(other, names, line)
            compared = compare_scores(scores, others)
            figures["baseline"] = {**about_other, "tasks": [score.as_dict() for score in others]}
            figures["comparison"] = [asdict(comparison) for comparison in compared]
            tables += [_score_table(f"baseline: {other}", others), _comparison_table(compared)]
    if about["truncated"]:
        log.warning(
            f"{about['truncated']:,} answers were scored with a shortened context: the model's is too short for them"
        )
    publish(TASKS_KIND, out, figures, tables, as_json, figures_file="tasks.json")


def _score_table(title: str, scores: list[TaskScore]) -> Table:
    table: Table = columns_table(
        title,
        ["task", "metric", "value", "standard error", "chance", "n"],
        [
            [
                score.task,
                score.metric,
                f"{score.value:.4f}",
                _figure(score.stderr),
                _figure(score.chance),
                "" if score.n is None else f"{score.n:,}",
            ]
            for score in scores
        ],
    )
    return table


def _comparison_table(compared: list[Comparison]) -> Table:
    table: Table = columns_table(
        "difference to the baseline, paired",
        ["task", "metric", "difference", "95 % interval", "model is"],
        [
            [
                row.task,
                row.metric,
                f"{row.difference:+.4f}",
                "" if row.low is None else f"{row.low:+.4f} to {row.high:+.4f}",
                row.verdict,
            ]
            for row in compared
        ],
    )
    return table


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _refuse_task_options(**options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise typer.BadParameter("it needs --tasks", param_hint=f"--{name.replace('_', '-')}")

"""psannlm compare: ablation study of variants, seeds and learning rates, with paired confidence intervals."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table as RichTable
from rich.text import Text

from psannlm.commands.options import (
    DEFAULT_RUNS,
    JsonOption,
    LiveLine,
    live_line,
    open_table,
    print_json,
    publish,
    stderr_console,
    stdout_console,
)

if TYPE_CHECKING:
    from psannlm.experiments.launchers import Launching
    from psannlm.experiments.lr_selection import Halves
    from psannlm.experiments.measures.document_losses import RunDocuments
    from psannlm.experiments.model import Study
    from psannlm.experiments.reuse import KeptRun
    from psannlm.reports.page_model import Table
    from psannlm.reports.schemas.study import StudyMetrics


class LauncherName(str, Enum):
    """Where the runs of a study are trained."""

    LOCAL = "local"
    SLURM = "slurm"


# Variant, loss, difference, interval, bits per byte, learning rate: the columns that fit into 80 characters.
_MAIN_COLUMNS = (0, 1, 3, 4, 6, 7)
# Variant, difference, token ratio, pooled interval, interval over documents, corrected p-value.
_COMPARED_COLUMNS = (0, 1, 3, 5, 6, 7)
# Variant, tokens, loss, difference, interval, learning rate.
_HORIZON_COLUMNS = (0, 1, 2, 4, 5, 6)

PlanArgument = Annotated[
    Path,
    typer.Argument(metavar="PLAN", help="Study configuration (YAML): base, variants, baseline, seeds, budget."),
]
JobsOption = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        min=1,
        help="Number of runs trained at the same time; they divide the CPU cores (default: one per GPU, or 1).",
    ),
]
GpusOption = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        metavar="all|none|LIST",
        help="GPUs that runs are assigned to, one each: all, none, or entries of CUDA_VISIBLE_DEVICES, or indices, "
        "separated by commas (default: all, if the plan's train.device is auto or cuda).",
    ),
]
ShareGpusOption = Annotated[
    bool,
    typer.Option("--share-gpus", help="Allow more jobs than GPUs; throughput is then left out of the results."),
]
LauncherOption = Annotated[
    LauncherName,
    typer.Option("--launcher", help="Where runs are trained: local (this machine), or slurm (one job per run)."),
]
SlurmOption = Annotated[
    list[str] | None,
    typer.Option(
        "--slurm",
        metavar="KEY=VALUE",
        help="Option of sbatch for each job, such as partition=gpu or time=4:00:00 (default: 1 hour; a run that "
        "reaches it saves and is requeued); may be repeated.",
    ),
]
ReuseOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--reuse",
        metavar="REPORT",
        help="Report or study folder whose finished runs are taken over instead of being trained, where "
        "configuration, text and code are the same; may be repeated.",
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Print all runs with parameters, tokens and estimated time, and write nothing."),
]
NoTrainOption = Annotated[
    bool, typer.Option("--no-train", help="Write the results of the finished runs, and train nothing.")
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="VARIANT", help="Train only this variant; may be repeated. The results show all."),
]
StudyOption = Annotated[
    Path | None, typer.Option("--study", help="Folder of the runs; default: runs/<name of the plan>.")
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Output folder of the results; default: reports/ablations/<time>.")
]


def compare(
    plan: PlanArgument,
    jobs: JobsOption = None,
    gpus: GpusOption = None,
    share_gpus: ShareGpusOption = False,
    launcher: LauncherOption = LauncherName.LOCAL,
    slurm: SlurmOption = None,
    reuse: ReuseOption = None,
    dry_run: DryRunOption = False,
    no_train: NoTrainOption = False,
    only: OnlyOption = None,
    study: StudyOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train variants of one configuration at equal size and compare their validation losses, with intervals."""
    from psannlm.experiments.finished_runs import RUNS_FILE, Measured, write_finished_runs
    from psannlm.experiments.launchers import choose_launching
    from psannlm.experiments.lr_selection import with_selected_lrs
    from psannlm.experiments.measures.activation_costs import measure_activations
    from psannlm.experiments.measures.document_losses import measure_documents
    from psannlm.experiments.measures.task_accuracy import score_runs
    from psannlm.experiments.plan import load_plan
    from psannlm.experiments.results import study_figures
    from psannlm.experiments.reuse import read_kept_runs, reuse_runs
    from psannlm.experiments.sizing import size_study
    from psannlm.io.run_metadata import require_folder

    if no_train and only:
        raise typer.BadParameter("--no-train trains no variant; use only one of the two options", param_hint="--only")
    if dry_run and no_train:
        raise typer.BadParameter(
            "--dry-run shows the remaining work, --no-train the finished work; use only one of them",
            param_hint="--no-train",
        )
    settled = load_plan(plan)
    wanted = _checked(only or [], [variant.name for variant in settled.variants])
    devices = [variant.config.train.device for variant in settled.variants]
    launching = choose_launching(
        launcher.value, devices, gpus=gpus, jobs=jobs, share_gpus=share_gpus, slurm=slurm or []
    )

    kept = read_kept_runs(reuse or [])

    if not dry_run:
        require_folder("ablations", out)
    with live_line(stderr_console()) as line:
        sized = size_study(settled, study or DEFAULT_RUNS / settled.name)
        if not dry_run:
            sized, known = _train(sized, wanted, kept, None if no_train else launching, line)
            answers = score_runs(sized, line.show, is_kept=not no_train)
            documents = measure_documents(sized, known, is_kept=not no_train, on_status=line.show)
            activations = measure_activations(sized, is_kept=not no_train, on_status=line.show)
    if dry_run:
        sized = with_selected_lrs(sized, _half_losses(sized)[0])
        shown = _run_names(sized, wanted)
        reuse_runs(sized, shown, kept, is_dry=True)
        _show_plan(replace(sized, runs=tuple(run for run in sized.runs if run.name in shown)), launching, as_json)
        return
    figures = study_figures(sized, answers, documents, activations)
    n_more = len(settled.settings.also_compare_to) + (3 if settled.settings.answers else 2)
    n_more += bool(settled.settings.horizons) + (2 if settled.settings.activations_bits else 0)
    folder = _publish(figures, n_more, launching, out, as_json)
    measured = {
        name: Measured(
            answers=answers.get(name),
            task=settled.settings.answers if name in answers else None,
            measure=settled.settings.measure if name in answers else None,
            documents=documents[name].record if name in documents else None,
            activations=activations[name].record if name in activations else None,
        )
        for name in {*answers, *documents, *activations}
    }
    write_finished_runs(folder / RUNS_FILE, sized, measured)
    if not no_train:
        _refuse_failures(figures)


def _run_names(study: Study, variants: Collection[str], but: Collection[str] = ()) -> list[str]:
    return [run.name for run in study.runs if run.variant.variant.name in variants and run.name not in but]


def _train(
    study: Study, variants: Collection[str], kept: Sequence[KeptRun], launching: Launching | None, line: LiveLine
) -> tuple[Study, dict[str, RunDocuments]]:
    """Reuse or train the runs of ``lr_seeds``, then those of the other seeds.

    Without ``launching``, nothing is trained.

    Returns:
        the study with all runs, and the losses by document that were measured to select learning rates.
    """
    from psannlm.experiments.lr_selection import with_selected_lrs
    from psannlm.experiments.reuse import reuse_runs
    from psannlm.experiments.runner import run_all

    launcher = None if launching is None else launching.launcher(study.folder)

    def complete(names: list[str]) -> None:
        # Branches start from checkpoints of the runs they branch off.
        branches = {run.name for run in study.runs if run.trunk is not None}
        for part in ([name for name in names if name not in branches], [name for name in names if name in branches]):
            reuse_runs(study, part, kept)
            if part and launching is not None and launcher is not None:
                run_all(study, placement=launching.placement, only=part, on_status=line.show, launcher=launcher)

    search_runs = _run_names(study, variants)
    complete(search_runs)
    halves, known = _half_losses(study, line, is_kept=launching is not None)
    study = with_selected_lrs(study, halves)
    if others := _run_names(study, variants, but=search_runs):
        complete(others)
    return study, known


def _half_losses(
    study: Study, line: LiveLine | None = None, *, is_kept: bool = False
) -> tuple[Halves, dict[str, RunDocuments]]:
    """Return the losses that select learning rates with ``choose_on: tune``, and those by document they follow from."""
    from psannlm.experiments.measures.document_losses import half_losses, measure_documents

    if study.plan.settings.choose_on == "all":
        return None, {}
    known = measure_documents(study, is_kept=is_kept, on_status=(lambda text: None) if line is None else line.show)
    return half_losses(study, known), known


def _publish(figures: StudyMetrics, n_more: int, launching: Launching, out: Path | None, as_json: bool) -> Path:
    """Write figures, tables and plots, print the main table and the ``n_more`` after it, and return the folder."""
    from psannlm.io.atomic import write_bytes
    from psannlm.io.run_metadata import system_info
    from psannlm.reports.tables.study import COMPARED, HORIZONS, study_pictures, study_tables

    tables = study_tables(figures)

    def short(table: Table) -> RichTable:
        columns = _COMPARED_COLUMNS if table.title.startswith(COMPARED) else ()
        return _rich(table, _HORIZON_COLUMNS if table.title == HORIZONS else columns)

    def draw(folder: Path) -> None:
        for picture in study_pictures(figures):
            write_bytes(folder / picture.file, picture.png)

    written: Path = publish(
        "ablations",
        out,
        figures.as_dict(),
        [_rich(table) for table in tables],
        as_json,
        shown=[_rich(tables[0], _MAIN_COLUMNS), *map(short, tables[1 : 1 + n_more])],
        draw=draw,
        system={**system_info(), **launching.placement.as_dict()},
        remark=": all columns and runs in table.txt, and on the page of psannlm report",
    )
    return written


def _checked(only: list[str], names: list[str]) -> frozenset[str]:
    """Return the variants to train: those of ``--only``, or all. Raises ConfigError for an unknown name."""
    from psannlm.errors import ConfigError, nearest

    for name in only:
        if name not in names:
            message = (
                f"--only {name}: not one of the plan's variants{nearest(name, names)}; they are {', '.join(names)}"
            )
            raise ConfigError(message)
    return frozenset(only or names)


def _refuse_failures(figures: StudyMetrics) -> None:
    """Raise TrainingError where runs failed; the figures of the others have been written and shown by then."""
    from psannlm.errors import TrainingError

    failed = [run for run in figures.runs if run.state == "failed"]
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(figures.runs)} runs failed, the first: {failed[0].run}: {failed[0].reason}"
            f". The logs are in {figures.folder}; the same command retries these runs"
        )


def _show_plan(study: Study, launching: Launching, as_json: bool) -> None:
    from psannlm.experiments.results import plan_tables, seconds_per_step

    with live_line(stderr_console()) as line:
        seconds = {}
        for run in study.runs:
            name = run.variant.variant.name
            if name not in seconds:
                line.show(f"timing steps: {name}")
                seconds[name] = seconds_per_step(run, study)
    tables = plan_tables(study, seconds, min(launching.placement.jobs, len(study.runs)))
    if as_json:
        keys = ("parameters", "n_steps", "n_tokens", "was_solved")
        variants = {
            sized.variant.name: {**{key: getattr(sized, key) for key in keys}, "d_mlp": sized.model.d_mlp}
            for sized in study.variants
        }
        print_json({"variants": variants, "seconds_per_step": seconds, "runs": [run.name for run in study.runs]})
    else:
        stdout_console().print(*map(_rich, tables), sep="\n")


def _rich(table: Table, columns: tuple[int, ...] = ()) -> RichTable:
    """Return a report's table, or only its ``columns``, for the terminal."""
    drawn: RichTable = open_table(table.title, caption=table.note)
    drawn.padding = (0, 1, 0, 0)
    chosen = columns or tuple(range(len(table.headings)))
    for at in chosen:
        # Folded, never cut: half a number is another number.
        side: Literal["left", "right"] = "right" if at in table.numbers else "left"
        drawn.add_column(table.headings[at], justify=side, no_wrap=at == 0, overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(row[at]) for at in chosen))
    return drawn

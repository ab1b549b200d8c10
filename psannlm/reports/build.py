"""Writing of a report: tables, plots, Markdown and one HTML page in ``reports/benchmarks/<ts>/``."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from psannlm.display import csv_cell
from psannlm.errors import ArtifactError, ConfigError
from psannlm.io.atomic import write_bytes, write_text
from psannlm.io.readers import Unreadable
from psannlm.io.run_metadata import new_folder, write_json
from psannlm.reports.gather import OWN_KIND, PUBLISHED_FOLDER, Gathered, Unread, gather
from psannlm.reports.page_model import Document, Origin, Picture
from psannlm.reports.pages import CURVE_FILE, build_document, drawn, loss_picture
from psannlm.reports.render import to_html, to_markdown
from psannlm.reports.run_comparison import compare_runs, deltas, differing_settings
from psannlm.reports.runs import METRICS_FILE, RunRecord, read_run
from psannlm.reports.schemas.gpu import SuiteReport
from psannlm.reports.schemas.runs import ReportedRun, ReportMetrics
from psannlm.reports.tables.generic import memory_rows, rate_rows
from psannlm.reports.tables.gpu import suite_memory, suite_rates
from psannlm.runtime.progress import OnProgress, Progress, ignore_progress

PAGE_FILE, MARKDOWN_FILE = "report.html", "report.md"
THROUGHPUT_FILE, MEMORY_FILE = "throughput.csv", "memory.json"
RUNS_CSV_FILE, RUNS_JSON_FILE, STEPS_FILE = "runs.csv", "metrics.json", "metrics.csv"
STEP_COLUMNS = (
    "run",
    "step",
    "loss",
    "train_perplexity",
    "val_loss",
    "perplexity",
    "bits_per_byte",
    "ema_val_loss",
    "lr",
    "grad_norm",
    "tokens",
    "tokens_per_s",
    "peak_memory_bytes",
    "folder",
)
_RATE_COLUMNS = (
    "timestamp",
    "kind",
    "name",
    "base",
    "mlp",
    "batch_tokens",
    "seq_len",
    "parameters",
    "dtype",
    "precision",
    "device",
    "figure",
    "tokens_per_s",
    "tokens_per_s_lowest",
    "tokens_per_s_highest",
    "machine",
    "artifact",
)


@dataclass(frozen=True)
class Report:
    """A written report: its folder, its page, and the number of runs and artifacts in it."""

    folder: Path
    page: Path
    n_runs: int
    n_artifacts: int
    unread: list[Unread]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures and paths as plain data."""
        return {
            "folder": str(self.folder),
            "page": str(self.page),
            "runs": self.n_runs,
            "artifacts": self.n_artifacts,
            "left_out": [{"path": str(item.path), "reason": item.reason} for item in self.unread],
        }


def write_report(
    reports: Path,
    runs: Sequence[Path],
    system: dict[str, Any],
    *,
    since: datetime | None = None,
    kinds: Collection[str] = (),
    published: bool = False,
    records: Sequence[Path] = (),
    out: Path | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Report:
    """Gather the artifacts under ``reports`` and the runs under ``runs``, and write the report.

    Args:
        system: the ``system.json`` of the report: command, machine and versions.
        since: leave out what is older.
        kinds: the kinds of artifacts to include (``runs`` is one); all of them when empty.
        published: include the results kept in ``reports/published``.
        records: folders at or below which records of ``psannlm tokenize`` and ``prep`` are searched.
        out: folder to write to, instead of ``reports/benchmarks/<ts>``.
        on_progress: called before each part of the work.

    Raises:
        ConfigError: ``kinds`` has a kind that does not exist.
        ArtifactError: there is nothing to report.
        StorageError: the report cannot be written.
    """
    on_progress(Progress(f"reading {reports}"))
    found = gather(reports, runs, since=since, kinds=kinds, published=published, records=records)
    if found.is_empty:
        where = ", ".join(f"{path}/" for path in (reports, *runs))
        kept = "; --published includes the results that the repository keeps"
        raise ArtifactError(
            f"nothing to report under {where}; make a run with: psannlm train CONFIG.yaml (or name its folder with "
            f"--runs, or an earlier --since){kept if (reports / PUBLISHED_FOLDER).is_dir() and not published else ''}"
        )
    rates, memory = _rates(found), _memory(found)
    document = build_document(found, Origin.of(system), rates, on_progress)
    folder = new_folder(OWN_KIND, out)
    write_text(folder / THROUGHPUT_FILE, _csv(rates, _RATE_COLUMNS))
    write_json(folder / MEMORY_FILE, memory)
    _write_runs(folder, found.runs)
    _write_pages(folder, document, system, _curve_of_all(found, document))
    return Report(folder, folder / PAGE_FILE, len(found.runs), len(found.artifacts), found.unread)


def write_comparison(runs: Sequence[Path], system: dict[str, Any], *, out: Path | None = None) -> Report:
    """Compare two or more runs and write the page; differences are against the first.

    Raises:
        ConfigError: fewer than two, or one of them is not a run folder.
        ArtifactError: the log of one cannot be read.
        StorageError: the report cannot be written.
    """
    if len(runs) < 2:
        raise ConfigError("--compare takes two run folders or more: --compare runs/a --compare runs/b")
    records = [_record(path, name) for path, name in zip(runs, _names(runs), strict=True)]
    unread = [Unread(record.folder, problem) for record in records for problem in record.problems]
    document = compare_runs(records, Origin.of(system), unread)
    folder = new_folder(OWN_KIND, out)
    _write_runs(folder, records)
    content = {
        "differences": {
            key: dict(zip(_names(runs), row, strict=True)) for key, row in differing_settings(records).items()
        },
        "deltas": [deltas(records[0], record) for record in records[1:]],
    }
    write_json(folder / "comparison.json", content)
    _write_pages(folder, document, system, [])
    return Report(folder, folder / PAGE_FILE, len(records), 0, unread)


def _record(path: Path, name: str) -> RunRecord:
    if not (path / METRICS_FILE).is_file():
        raise ConfigError(f"{path} is not a run folder: it has no {METRICS_FILE}")
    try:
        return read_run(path, name)
    except Unreadable as error:
        raise ArtifactError(f"{path}: {error}") from error


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the names of the folders, or their paths where two have the same name."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _rates(found: Gathered) -> list[dict[str, Any]]:
    """Return the rows of throughput.csv: every throughput of every artifact and run."""
    rows = []
    for artifact in found.artifacts:
        place = {
            "timestamp": artifact.timestamp,
            "kind": artifact.kind,
            "machine": Origin.of(artifact.system).machine,
            "artifact": str(artifact.folder),
        }
        suite = artifact.metrics if isinstance(artifact.metrics, SuiteReport) else None
        rows += [{**row, **place} for row in (suite_rates(suite) if suite else rate_rows(artifact.figures))]
    for run in found.runs:
        if run.tokens_per_s is not None:
            machine = Origin.of(run.system).machine
            place = {"kind": "runs", "name": run.name, "machine": machine, "artifact": str(run.folder)}
            rows.append({**run.row.as_dict(), "figure": "tokens_per_s", "dtype": run.config.get("train.amp"), **place})
    return rows


def _memory(found: Gathered) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for artifact in found.artifacts:
        place = {"timestamp": artifact.timestamp, "kind": artifact.kind, "artifact": str(artifact.folder)}
        suite = artifact.metrics if isinstance(artifact.metrics, SuiteReport) else None
        rows += [{**place, **row} for row in (suite_memory(suite) if suite else memory_rows(artifact.figures))]
    for run in found.runs:
        if run.peak_memory_bytes is not None:
            figure = {
                "name": run.name,
                "figure": "peak_memory_bytes",
                "bytes": run.peak_memory_bytes,
                "grad_checkpoint": run.config.get("train.grad_checkpoint"),
                "wall_time_s": run.wall_time_s,
                "wall_time_of": None if run.wall_time_s is None else "all training steps",
            }
            rows.append({"timestamp": run.timestamp, "kind": "runs", "artifact": str(run.folder), **figure})
    return rows


def _write_runs(folder: Path, runs: Sequence[RunRecord]) -> None:
    rows = [run.row.as_dict() for run in runs]
    if rows:
        write_text(folder / RUNS_CSV_FILE, _csv(rows, tuple(rows[0])))
    steps = [{**step, "folder": str(run.folder)} for run in runs for step in run.step_rows()]
    write_text(folder / STEPS_FILE, _csv(steps, STEP_COLUMNS))
    metrics = ReportMetrics([ReportedRun(**row, settings=run.config) for row, run in zip(rows, runs, strict=True)])
    write_json(folder / RUNS_JSON_FILE, metrics.as_dict())


def _curve_of_all(found: Gathered, document: Document) -> list[Picture]:
    """Return the loss curve where the page has none because all runs belong to studies."""
    shown = [block.file for section in document.sections for block in section.blocks if isinstance(block, Picture)]
    is_tried = any(item.path.name == CURVE_FILE for item in found.unread)
    if not found.runs or CURVE_FILE in shown or is_tried:
        return []
    return drawn(CURVE_FILE, lambda: [loss_picture(found.runs)], found.unread)


def _csv(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    page = io.StringIO()
    writer = csv.DictWriter(page, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: csv_cell(row.get(key)) for key in columns} for row in rows)
    return page.getvalue()


def _write_pages(folder: Path, document: Document, system: dict[str, Any], pictures: Sequence[Picture]) -> None:
    blocks = [block for section in document.sections for block in section.blocks if isinstance(block, Picture)]
    for picture in {picture.file: picture for picture in (*pictures, *blocks)}.values():
        write_bytes(folder / picture.file, picture.png)
    write_json(folder / "system.json", system)
    write_text(folder / MARKDOWN_FILE, to_markdown(document))
    write_text(folder / PAGE_FILE, to_html(document))

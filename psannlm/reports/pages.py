"""Content of the report page: headline figures, then sections of runs, studies and benchmarks."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from psannlm.display import shortened
from psannlm.errors import PictureError
from psannlm.io.readers import Unreadable, read_bytes
from psannlm.reports.gather import Artifact, Gathered, Unread
from psannlm.reports.page_model import (
    Block,
    Document,
    Headline,
    Origin,
    Picture,
    Printed,
    Section,
    Table,
    format_float,
    format_value,
    lossy_mark,
)
from psannlm.reports.plots import Bar, Curve, draw_bars, draw_curves
from psannlm.reports.runs import RunRecord
from psannlm.reports.schemas.gpu import SuiteReport
from psannlm.reports.schemas.serving import ServingMetrics
from psannlm.reports.schemas.study import StudyMetrics
from psannlm.reports.schemas.throughput import ThroughputMetrics
from psannlm.reports.tables.generic import tables_of
from psannlm.reports.tables.gpu import suite_headlines, suite_tables
from psannlm.reports.tables.serving import serving_headlines, serving_pictures, serving_tables
from psannlm.reports.tables.study import study_headline, study_pictures, study_tables
from psannlm.reports.tables.throughput import throughput_tables
from psannlm.runtime.progress import OnProgress, Progress, ignore_progress
from psannlm.tokenizers.roundtrip import LOSSY_NOTE

STUDY_KIND, THROUGHPUT_KIND = "ablations", "throughput"
STUDY_FILE = "study.json"
CURVE_FILE = "loss_curve.png"
_MOST_CURVES = 12
_MOST_BARS = 24
_LARGEST_PICTURE_BYTES = 3 << 20
_MOST_PICTURES = 40
_MOST_UNREAD, _LONGEST_REASON = 500, 500
_PNG = b"\x89PNG\r\n\x1a\n"
# Width and height in the header; a small file may ask a reader for gigabytes.
_PNG_SIZES, _MOST_PIXELS = slice(16, 24), 50_000_000
_LONGEST_NAME_BYTES = 160
_TITLES = {
    "tokenizers": "Tokenizers",
    "kv_cache": "Decoding with the cache",
    "serving": "Serving under load",
    "throughput": "Training throughput",
    "ablations": "Comparison of models",
    "gpu": "GPU validation",
    "tests": "Test suites",
    "prep": "Corpus preparation",
    "tasks": "Task scores",
}


def build_document(
    found: Gathered,
    origin: Origin,
    rates: Sequence[dict[str, Any]],
    on_progress: OnProgress = ignore_progress,
) -> Document:
    """Return the page; figures that turn out to be unusable are added to ``found.unread``.

    Args:
        origin: the command and the machine that make the page.
        rates: the rows of ``throughput.csv``.
        on_progress: called before each section, which takes up to two seconds for each of its pictures.
    """
    runs = _runs_outside_studies(found.runs)
    n_sections = bool(runs) + len(found.artifacts)
    sections: list[Section] = []

    def show(title: str) -> None:
        on_progress(Progress(f"drawing {title}", len(sections) + 1, n_sections, "sections"))

    if runs:
        show("training runs")
        sections.append(_runs_section(runs, len(found.runs) - len(runs), found.unread))
    headlines = _run_headlines(runs)
    for artifact in sorted(found.artifacts, key=lambda artifact: artifact.kind != STUDY_KIND):
        title = _title(artifact)
        show(title)
        blocks, artifact_headlines = _artifact_blocks(artifact, found.unread)
        sections.append(Section(title, blocks, Origin.of(artifact.system, str(artifact.folder))))
        headlines += artifact_headlines
    if bars := _rate_bars(rates):
        caption = f"Medians with the lowest and highest value, of the newest {_MOST_BARS} at most."
        sections += [
            Section("Training throughput compared", [picture])
            for picture in drawn(
                "throughput.png",
                lambda: [draw_bars("throughput.png", bars, "training tokens per second", caption)],
                found.unread,
            )
        ]
    if found.unread:
        sections.append(Section("Left out", [_unread_table(found.unread)]))
    counts = (
        f"{_count(len(found.runs), 'training run')}, {_count(len(found.artifacts), 'benchmark')}, "
        f"{_count(len(found.unread), 'thing')} left out."
    )
    return Document("psannlm: report", counts, list(dict.fromkeys(headlines))[:6], sections, origin)


def drawn(where: str | Path, draw: Callable[[], list[Picture]], unread: list[Unread]) -> list[Picture]:
    """Return the pictures that ``draw`` makes, or none and the reason in ``unread`` where one cannot be drawn."""
    try:
        return draw()
    except PictureError as error:
        unread.append(Unread(Path(where), str(error)))
        return []


def _title(artifact: Artifact) -> str:
    """Return the kind of the artifact, its time, and what the name of its folder adds to the time."""
    added = re.sub(r"^[0-9]{8}_[0-9]{6}_?", "", artifact.folder.name).replace("_", " ")
    parts = [_TITLES.get(artifact.kind, artifact.kind), _day(artifact.timestamp), added]
    return ", ".join(part for part in parts if part)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _day(timestamp: str) -> str:
    return timestamp[:16].replace("T", " ") + " UTC"


def _runs_outside_studies(runs: Iterable[RunRecord]) -> list[RunRecord]:
    """Return the runs that belong to no study: a study has a section of its own, and many runs."""
    return [run for run in runs if not (run.folder.parent / STUDY_FILE).is_file()]


def _runs_section(runs: Sequence[RunRecord], n_in_studies: int, unread: list[Unread]) -> Section:
    blocks: list[Block] = []
    if n_in_studies:
        blocks.append(f"{n_in_studies} runs of studies are in runs.csv; their studies have sections of their own.")
    blocks.append(runs_table(runs))
    if any(run.task_rows for run in runs):
        blocks.append(tasks_table(runs))
    blocks += [*drawn(CURVE_FILE, lambda: [loss_picture(runs)], unread), origins_table(runs)]
    return Section("Training runs", blocks)


def runs_table(runs: Sequence[RunRecord]) -> Table:
    """Return a row for every run: its model, its progress and its best validation."""
    headings: tuple[str, ...] = (
        "run",
        "validation loss, nats per token",
        "bits per byte",
        "perplexity",
        "at step",
        "training loss, last step",
        "steps",
        "tokens",
        "tokens/s, median",
        "parameters",
        "base",
        "corpus",
        "peak memory, MB",
    )
    rows = []
    for run in runs:
        row = run.row
        peak = row.peak_memory_bytes
        base = str(row.base or "–") + (f", {row.mlp}" if row.mlp else "")
        rows.append(
            [
                run.name,
                format_value(row.val_loss),
                format_value(row.bits_per_byte) + lossy_mark(row.lossy_tokenizer),
                format_value(row.perplexity),
                format_value(row.val_step),
                format_value(row.train_loss),
                format_value(row.step),
                format_value(row.tokens),
                format_value(row.tokens_per_s, 3),
                format_value(row.parameters),
                base,
                run.corpus,
                "–" if peak is None else f"{peak / 1e6:,.0f}",
            ]
        )
    if any(run.ema_rows for run in runs):
        headings = (*headings, "validation loss, EMA of the weights")
        rows = [[*row, format_value(run.row.ema_val_loss)] for row, run in zip(rows, runs, strict=True)]
    note = (
        "The best validation of each run. Losses and perplexities compare where corpus and tokenizer are the same, "
        "bits per byte compare on the same text."
    )
    if any(run.ema_rows for run in runs):
        note += " That of the averaged weights (train.ema) is of the last validation."
    if any(run.row.lossy_tokenizer for run in runs):
        note += LOSSY_NOTE
    return Table("", headings, rows, frozenset((*range(1, 10), 12, 13)), note)


def tasks_table(runs: Sequence[RunRecord]) -> Table:
    """Return a row for every task of every run, scored at the last validation."""
    rows = [
        [
            run.name,
            task,
            format_value(score, 3),
            format_value(stderr, 3),
            format_value(chance, 3),
            format_value(run.task_rows[-1]["step"]),
        ]
        for run in runs
        for task, (score, stderr, chance) in run.task_scores().items()
    ]
    headings = ("run", "task", "score", "standard error", "chance level", "at step")
    return Table("Task scores", headings, rows, frozenset((2, 3, 4, 5)), "Of the last validation of each run.")


def origins_table(runs: Sequence[RunRecord]) -> Table:
    """Return the command, the machine and the commit that made each run, and the model that a run started from."""
    origins = [(run, Origin.of(run.system)) for run in runs]
    rows = [[run.name, o.command or "–", o.machine or "–", o.commit or "–", str(run.folder)] for run, o in origins]
    headings: tuple[str, ...] = ("run", "command", "machine", "commit", "folder")
    if any(run.parent is not None for run in runs):
        headings = (*headings, "weights from")
        rows = [[*row, run.parent or "new"] for row, run in zip(rows, runs, strict=True)]
    return Table("Commands and machines", headings, rows)


def loss_picture(runs: Sequence[RunRecord]) -> Picture:
    """Return training (faint) and validation loss of the newest runs against the tokens seen."""
    drawn = list(runs)[-_MOST_CURVES:]
    curves = []
    for run in drawn:
        evaluations, steps = run.points(), run.points("train")
        if steps:
            is_faint = bool(evaluations)
            curves.append(Curve(run.name, [p[0] for p in steps], [p[2] for p in steps], is_faint))
        if evaluations:
            curves.append(Curve(run.name, [p[0] for p in evaluations], [p[2] for p in evaluations]))
        if averaged := run.points("ema"):
            name = f"{run.name}, EMA of the weights"
            curves.append(Curve(name, [p[0] for p in averaged], [p[2] for p in averaged]))
    left_out = f" The newest {_MOST_CURVES} of {len(runs)} runs." if len(runs) > _MOST_CURVES else ""
    caption = (
        "Validation loss (marked), and the loss of single training steps (faint); on the right, perplexity, which is "
        f"exp(loss).{left_out}"
    )
    return draw_curves(CURVE_FILE, curves, "tokens seen", "loss (nats per token)", caption, has_perplexity=True)


def _run_headlines(runs: Sequence[RunRecord]) -> list[Headline]:
    found = []
    scored = [run for run in runs if run.best is not None and isinstance(run.best.get("bits_per_byte"), float)]
    # A lossy tokenizer makes bits per byte too low, so a run with one is the best only among its like.
    scored = [run for run in scored if not run.row.lossy_tokenizer] or scored
    if scored:
        best = min(scored, key=lambda run: (run.best or {})["bits_per_byte"])
        row = best.row
        of = f"{best.name}, {format_value(row.parameters)} parameters, on {best.corpus}"
        found.append(
            Headline(
                f"{row.bits_per_byte:.3f}{lossy_mark(row.lossy_tokenizer)}",
                "bits per byte",
                "Best validation",
                of,
            )
        )
        found.append(
            Headline(
                format_value(row.val_loss),
                "nats per token",
                "Its validation loss",
                f"perplexity {format_value(row.perplexity)}",
            )
        )
    rated = [run for run in runs if run.tokens_per_s is not None]
    if rated:
        fastest = max(rated, key=lambda run: (run.tokens_per_s or {})["median"])
        median = (fastest.tokens_per_s or {})["median"]
        of = f"{fastest.name}; {Origin.of(fastest.system).machine}"
        found.append(Headline(format_float(median, 3), "tokens/s", "Fastest training run", of))
    return found


def _artifact_blocks(artifact: Artifact, unread: list[Unread]) -> tuple[list[Block], list[Headline]]:
    blocks: list[Block] = []
    prefix = _file_name(artifact.kind, artifact.folder.name, "")
    if artifact.problem:
        unread.append(Unread(artifact.folder, artifact.problem))
    tables, pictures, headlines = _of_its_kind(artifact, prefix, unread)
    blocks += [*tables[:1], *pictures, *tables[1:]]
    shown = {picture.file.removeprefix(prefix) for picture in pictures}
    blocks += _pictures(artifact, prefix, shown, unread)
    if artifact.table.strip():
        blocks.append(Printed("Output of the command", artifact.table))
    return blocks, headlines


def _of_its_kind(
    artifact: Artifact, prefix: str, unread: list[Unread]
) -> tuple[list[Table], list[Picture], list[Headline]]:
    """Return tables, pictures and headlines; kinds without a layout of their own have generic tables."""
    metrics = artifact.metrics
    if isinstance(metrics, StudyMetrics):
        headline = study_headline(metrics)
        pictures = drawn(artifact.folder, lambda: study_pictures(metrics, prefix), unread)
        return study_tables(metrics), pictures, [] if headline is None else [headline]
    if isinstance(metrics, SuiteReport):
        return suite_tables(metrics), [], suite_headlines(metrics)
    if isinstance(metrics, ThroughputMetrics):
        return throughput_tables(metrics, artifact.figures), [], []
    if isinstance(metrics, ServingMetrics):
        pictures = drawn(artifact.folder, lambda: serving_pictures(metrics, prefix), unread)
        return serving_tables(metrics, artifact.figures), pictures, serving_headlines(metrics)
    return list(tables_of(artifact.figures)), [], []


def _pictures(artifact: Artifact, prefix: str, shown: set[str], unread: list[Unread]) -> Iterator[Picture]:
    files: set[str] = {f"{prefix}{file}" for file in shown}
    for path in artifact.pictures:
        if path.name in shown:
            continue
        if len(files) == _MOST_PICTURES:
            unread.append(Unread(artifact.folder, f"more than {_MOST_PICTURES} pictures"))
            return
        try:
            content = read_bytes(path, _LARGEST_PICTURE_BYTES)
        except Unreadable as error:
            unread.append(Unread(path, str(error)))
            continue
        if not content.startswith(_PNG):
            unread.append(Unread(path, "not a PNG picture"))
            continue
        width, height = struct.unpack(">II", content[_PNG_SIZES].ljust(8, b"\0"))
        if width * height > _MOST_PIXELS:
            unread.append(Unread(path, f"a picture of {width:,} × {height:,} pixels"))
            continue
        name = path.stem.replace("_", " ")
        file = _file_name(prefix.rstrip("_"), path.name)
        if file in files:
            stem, suffix = file[: -len(".png")], ".png"
            file = next(other for at in count(2) if (other := f"{stem}_{at}{suffix}") not in files)
        files.add(file)
        yield Picture(file, f"{artifact.kind}: {name}", name, content)


def _file_name(*parts: str) -> str:
    """Return a file name that is safe in links, whatever the names of folders and files that it is made of."""
    name = re.sub(r"[^\w.-]", "_", "_".join(parts)).lstrip(".-")
    if len(name.encode("utf-8")) <= _LONGEST_NAME_BYTES:
        return name
    digest = hashlib.sha256(name.encode("utf-8")).hexdigest()[:12]
    return f"{name[:40]}_{digest}_{name[-24:]}"


def _rate_bars(rates: Sequence[dict[str, Any]]) -> list[Bar]:
    """Return training throughput of runs and of training benchmarks; tokenizers and decoding are left out."""
    rows = [row for row in rates if row["kind"] in ("runs", THROUGHPUT_KIND) and row["figure"] == "tokens_per_s"]
    return [
        Bar(row["name"] or row["kind"], row["tokens_per_s"], row["tokens_per_s_lowest"], row["tokens_per_s_highest"])
        for row in rows[-_MOST_BARS:]
    ]


def _unread_table(unread: Sequence[Unread]) -> Table:
    rows = [[str(item.path), shortened(item.reason, _LONGEST_REASON)] for item in unread[:_MOST_UNREAD]]
    more = f"{len(unread) - len(rows):,} more are left out. " if len(unread) > len(rows) else ""
    return Table("", ("where", "why"), rows, note=f"{more}Nothing else in the report depends on these.")

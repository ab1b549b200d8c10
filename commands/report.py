"""psannlm report: one page of all runs and benchmarks, or a comparison of runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from psannlm.commands.options import (
    DEFAULT_RUNS,
    JsonOption,
    figures_table,
    live_line,
    print_json,
    require_existing,
    stderr_console,
    stdout_console,
)

if TYPE_CHECKING:
    from psannlm.reports.build import Report


DEFAULT_REPORTS = Path("reports")


RunsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--runs",
        metavar="FOLDER",
        help="Run folder, prepared folder, or folder of such folders to include; may be repeated. Default: runs, "
        "and the records of tokenize and prep in the working folder.",
    ),
]
ReportsOption = Annotated[
    Path, typer.Option("--reports", help="Folder of the artifacts that benchmarks wrote, as <kind>/<time>.")
]
SinceOption = Annotated[
    str | None,
    typer.Option(
        "--since",
        metavar="TIME",
        help="Leave out everything older than a date (2026-11-24) or an age (36h, 7d). Default: include all.",
    ),
]
KindOption = Annotated[
    list[str] | None,
    typer.Option(
        "--kind",
        metavar="KIND",
        help="Include this kind only: runs, throughput, tokenizers, kv_cache, ablations, gpu, ...; may be "
        "repeated. Default: all.",
    ),
]
PublishedOption = Annotated[
    bool,
    typer.Option(
        "--published",
        help="Include the results that the repository publishes, in the folder published of --reports.",
    ),
]
CompareOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--compare",
        metavar="RUN",
        help="Run folder to compare with others instead of reporting everything; give two or more, the first "
        "is the baseline.",
    ),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Folder to write to. Default: reports/benchmarks/<time>.")
]


def report(
    runs: RunsOption = None,
    reports: ReportsOption = Path("reports"),
    since: SinceOption = None,
    kind: KindOption = None,
    published: PublishedOption = False,
    compare: CompareOption = None,
    also: Annotated[list[Path] | None, typer.Argument(metavar="RUN", help="More run folders for --compare.")] = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Gather benchmarks and runs into tables, plots, Markdown and one HTML page."""
    from psannlm.errors import ConfigError
    from psannlm.io.run_metadata import system_info
    from psannlm.reports.build import write_comparison, write_report
    from psannlm.reports.gather import parse_since

    require_existing("--runs", *(runs or []))
    if reports != DEFAULT_REPORTS:
        require_existing("--reports", reports)
    moment = None if since is None else parse_since(since)
    if also and not compare:
        raise ConfigError(f"{also[0]}: name folders of runs with --runs, or runs to compare with --compare")
    if compare and (runs or kind or since or published):
        raise ConfigError("--compare takes run folders and --out, and no --runs, --kind or --since, nor --published")
    with live_line(stderr_console()) as line:
        line.show("reading")
        if compare:
            written = write_comparison([*compare, *(also or [])], system_info(), out=out)
        else:
            folders = runs or [DEFAULT_RUNS]
            written = write_report(
                reports,
                folders,
                system_info(),
                since=moment,
                kinds=kind or (),
                published=published,
                # Unlike runs, prepared folders and tokenizers have no common parent folder.
                records=runs or [Path()],
                out=out,
                on_progress=line.show,
            )
    if as_json:
        print_json(written.as_dict())
    else:
        _show(written)


def _show(written: Report) -> None:
    rows = [("training runs", f"{written.n_runs:,}"), ("benchmarks", f"{written.n_artifacts:,}")]
    rows += [("left out", f"{item.path}: {item.reason}") for item in written.unread[:20]]
    if len(written.unread) > 20:
        rows.append(("left out", f"{len(written.unread) - 20:,} more, listed on the page"))
    rows += [("page", str(written.page)), ("folder", str(written.folder))]
    stdout_console().print(figures_table("report", rows))

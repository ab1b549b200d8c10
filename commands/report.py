"""psannlm report: what the other commands wrote, to tables, plots and one page; or runs side by side."""

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
    stderr_console,
    stdout_console,
)

if TYPE_CHECKING:
    from psannlm.reports.build import Report


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Option(
            "--runs",
            metavar="FOLDER",
            help="A run, a prepared folder, or a folder of them; may be repeated. Default: runs, and what "
            "tokenize and prep recorded in the working folder.",
        ),
    ] = None,
    reports: Annotated[Path, typer.Option("--reports", help="Where benchmarks left their folders.")] = Path("reports"),
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="Leave out what is older: 2026-11-24, 36h or 7d.")
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", help="Only these: runs, throughput, tokenizers, ...; may be repeated."),
    ] = None,
    published: Annotated[
        bool,
        typer.Option("--published", help="Include the results that the repository keeps, in published/ of --reports."),
    ] = False,
    compare: Annotated[
        list[Path] | None,
        typer.Option("--compare", metavar="RUN", help="A run folder to set beside others; give two or more."),
    ] = None,
    also: Annotated[list[Path] | None, typer.Argument(metavar="RUN", help="More runs for --compare.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for what is written.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Gather benchmarks and runs into tables, plots, Markdown and one HTML page."""
    from psannlm.errors import ConfigError
    from psannlm.io.run_metadata import system_info
    from psannlm.reports.build import write_comparison, write_report
    from psannlm.reports.gather import parse_since

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
                # Prepared folders and tokenizers have no folder of their own to stand in, as runs have.
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

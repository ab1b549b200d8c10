"""psannlm gpu-validate: the GPU validation suite GPU-01 to GPU-09, or its dry run on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from psannlm.commands.options import (
    JsonOption,
    live_line,
    open_table,
    publish,
    require_existing,
    stderr_console,
    table_text,
    write_artifact,
)

if TYPE_CHECKING:
    from psannlm.reports.schemas.gpu import CheckResult, SuiteReport

_STYLES = {"ok": "green", "failed": "red", "error": "red", "skipped": "yellow"}


def gpu_validate(
    only: Annotated[
        list[str] | None, typer.Option(help="Check to run, GPU-01 to GPU-09; may be repeated. Default: all.")
    ] = None,
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="Device; cpu is a dry run at small sizes.")] = "cuda",
    baseline: Annotated[
        Path | None, typer.Option(help="Earlier summary.json, or its folder; a value that became worse is a failure.")
    ] = None,
    baseline_any_machine: Annotated[
        bool, typer.Option("--baseline-any-machine", help="Allow a baseline that was measured on other hardware.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Output folder; default: reports/gpu/<time>.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check every part of psannlm on a GPU, each value against a limit; exit code 3 if a limit is missed."""
    from psannlm.errors import LimitMissed
    from psannlm.gpu_suite.plots import draw_suite
    from psannlm.gpu_suite.suite import SuiteLog, require_device, validate
    from psannlm.io.run_metadata import new_folder, system_info, write_json

    if baseline is not None:
        require_existing("--baseline", baseline)
    require_device(device, only or (), baseline, any_machine=baseline_any_machine)
    folder = new_folder("gpu", out)
    log = SuiteLog(folder / "stdout.log")
    write_json(folder / "system.json", system_info())
    with live_line(stderr_console()) as line:

        def say(text: str) -> None:
            log.say(text)
            line.show(text)

        def keep(report: SuiteReport) -> None:
            # After every check: a suite that is killed leaves the results of the checks that it has finished.
            write_artifact(folder, report.as_dict(), _tables(report), figures_file="summary.json")

        report = validate(
            device, only=only or (), baseline=baseline, any_machine=baseline_any_machine, say=say, on_report=keep
        )
    tables = _tables(report)
    log.add(table_text(*tables))
    publish(
        "gpu",
        out,
        report.as_dict(),
        tables,
        as_json,
        shown=tables[:1],
        draw=lambda folder: draw_suite(folder, report),
        folder=folder,
        figures_file="summary.json",
    )
    if report.problems:
        raise LimitMissed("; ".join(report.problems))


def _tables(report: SuiteReport) -> list[Table]:
    return [_overview(report), *(_check_table(result) for result in report.checks if result.measures)]


def _overview(report: SuiteReport) -> Table:
    machine = report.machine
    kind = "dry run on " if report.is_dry_run else ""
    table: Table = open_table(
        f"gpu-validate: {kind}{machine['n_devices']} x {machine['name']}, torch {machine['torch']}: {report.verdict}"
    )
    for heading in ("check", "what", "verdict"):
        table.add_column(heading, no_wrap=True)
    table.add_column("s", justify="right")
    table.add_column("result", overflow="fold")
    for result in report.checks:
        table.add_row(
            result.check,
            result.title,
            Text(result.status, style=_STYLES[result.status]),
            f"{result.seconds:,.1f}",
            Text(_result(result)),
        )
    lines = [f"not run yet: {', '.join(report.to_come)}"] if report.to_come else []
    if report.regressions:
        lines += ["worse than the baseline:", *report.regressions]
    table.caption = "\n".join(lines) or None
    return table


def _result(result: CheckResult) -> str:
    if result.status != "ok":
        lines = [result.skipped] if result.skipped else result.problems()
        return "\n".join(str(line).removeprefix(f"{result.check}: ") for line in lines)
    return f"{len(result.measures)} limits met"


def _check_table(result: CheckResult) -> Table:
    table: Table = open_table(f"{result.check}: {result.title}: {result.status}", caption="\n".join(result.notes))
    table.add_column("measured", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("limit", justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("why this limit", overflow="fold")
    for measure in result.measures:
        table.add_row(
            Text(f"{measure.name}: {measure.detail}" if measure.detail else measure.name),
            _figure(measure.value),
            f"{'≤' if measure.side == 'at most' else '≥'} {_figure(measure.limit)}",
            measure.unit,
            "ok" if measure.is_met else "MISSED",
            Text(measure.reason),
        )
    return table


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e4 or value == round(value) else f"{value:.4g}"

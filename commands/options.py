"""What the subcommands share: consoles, common options, and how an error looks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else; progress goes to stderr.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
CheckpointOption = Annotated[
    Path | None,
    typer.Option("--checkpoint", "-c", help="Model file or checkpoint folder. Default: the newest run's best."),
]
RunsOption = Annotated[Path, typer.Option("--runs", help="Where to look for the newest run.")]


def results() -> Console:
    """The console for what was asked for (stdout)."""
    return Console(soft_wrap=not Console().is_terminal)


def progress() -> Console:
    """The console for everything said on the way (stderr)."""
    return Console(stderr=True)


def print_json(content: Any) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False, default=str))


def figures_table(title: str, rows: list[tuple[str, str]]) -> Table:
    """Return a table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False, title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def find_model_file(checkpoint: Path | None, runs: Path) -> Path:
    """Return the checkpoint asked for, or the newest run's best.

    Raises:
        ArtifactError: none was given and none is there; the message says how to make one.
    """
    from psannlm.errors import ArtifactError
    from psannlm.training.checkpoint import find_checkpoint

    if checkpoint is not None:
        return checkpoint
    found = find_checkpoint(runs)
    if found is None:
        raise ArtifactError(
            f"no checkpoint under {runs}/; make one with: psannlm train configs/waveresnet_cpu.yaml "
            "(or name one with --checkpoint)"
        )
    return found

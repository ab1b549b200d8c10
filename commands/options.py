"""Options, consoles, progress lines and artifact folders that the subcommands share."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from psannlm.display import json_text, printable
from psannlm.runtime.consoles import FiguresTable, make_console, print_line
from psannlm.runtime.live_line import LiveLine as LiveLine
from psannlm.runtime.live_line import live_line as live_line

if TYPE_CHECKING:
    import torch

    from psannlm.config.model import ModelConfig

log = logging.getLogger(__name__)

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout instead of tables; progress goes to stderr.")
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="Device to compute on: auto (a GPU if there is one), cpu, cuda or cuda:N.")
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        "-c",
        help="Model file, checkpoint folder or run folder, of which the best checkpoint is taken. Default: the "
        "newest run in --runs.",
    ),
]
EmaOption = Annotated[
    bool,
    typer.Option(
        "--ema",
        help="Take the exponential moving average of the weights, which checkpoints of runs with train.ema hold. "
        "Default: the weights themselves.",
    ),
]
WeightDtype = Literal["float32", "bfloat16", "int8"]
DtypeOption = Annotated[
    WeightDtype,
    typer.Option(
        "--dtype",
        help="Data type of the weights; int8 stores one scale per output channel.",
    ),
]
ErrorModes = Literal["strict", "replace"]
ErrorsOption = Annotated[
    ErrorModes,
    typer.Option(
        "--errors",
        help="What to do with bytes that are not UTF-8 and with lone surrogates: strict stops, replace puts "
        "U+FFFD in their place and counts them.",
    ),
]
PerLineOption = Annotated[
    bool,
    typer.Option("--per-line", help="Read each line of a text file as a document. Default: the file is one document."),
]
TextKeyOption = Annotated[
    str, typer.Option("--text-key", help="Key or column of the text in .jsonl and .parquet files.")
]
BaseOption = Annotated[str, typer.Option("--base", help="Model base: respsann, waveresnet or transformer.")]
WidthOption = Annotated[int, typer.Option("--d-model", help="Model width: features of a token's hidden state.")]
LayersOption = Annotated[int, typer.Option("--n-layers", help="Number of transformer blocks.")]
HeadsOption = Annotated[int, typer.Option("--n-heads", help="Number of attention heads in each block.")]
PositionsOption = Annotated[
    str, typer.Option("--positional-encoding", help="Positional encoding: rope, alibi or sinusoidal.")
]
VocabularyOption = Annotated[int, typer.Option("--vocab-size", help="Vocabulary size of the model, in tokens.")]
AgainstOption = Annotated[
    list[str] | None,
    typer.Option(
        "--against",
        help="Reference model of equal size: transformers, for its Llama (needs the extra hf); llama.cpp "
        "(needs the extra gguf and llama-cpp-python) or ctranslate2, for our exported transformer; may be repeated.",
    ),
]
DEFAULT_RUNS = Path("runs")
RunsOption = Annotated[
    Path, typer.Option("--runs", help="Folder that is searched for the newest run where --checkpoint is not given.")
]


def duration_s(text: str) -> float:
    """Return the seconds in ``90s``, ``20m``, ``1.5h`` or ``1h30m``. Raises BadParameter for anything else."""
    seconds = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)([dhms])", text)
    total = sum(float(number) * seconds[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not total > 0:
        raise typer.BadParameter(f"{text!r} is not a duration; write 90s, 20m or 1h30m")
    return total


def stdout_console() -> Console:
    """Return the console for results (stdout)."""
    return make_console()


def stderr_console() -> Console:
    """Return the console for progress and messages (stderr), which prints above its own live line."""
    # A live line replaces the stream by a proxy of it.
    return _console_of(getattr(sys.stderr, "rich_proxied_file", sys.stderr))


@lru_cache(maxsize=1)
def _console_of(stream: Any) -> Console:
    # One for each stream: another console would print across the live line.
    return make_console(stderr=True)


def print_json(content: Any) -> None:
    """Print one JSON document on stdout."""
    encoding = str(getattr(sys.stdout, "encoding", None) or "utf-8")
    sys.stdout.write(json_text(content, indent=2, is_ascii=not encoding.lower().startswith("utf")) + "\n")
    sys.stdout.flush()


def text_argument(text: str) -> str:
    """Return a text given on the command line, read as UTF-8 where the locale (``LC_ALL=C``) made bytes of it."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


def print_path(text: str, *, style: str = "") -> None:
    """Print a line that holds paths or a command on stdout; a terminal that is narrower wraps it itself."""
    stdout_console().print(Text(printable(text, keep="\n")), style=style or None, soft_wrap=True)


def print_message(text: str) -> None:
    """Print a logged message on stderr, above the live line if there is one."""
    print_line(stderr_console(), text)


@contextmanager
def quiet_pipe() -> Iterator[None]:
    """End silently when the reader of stdout closes the pipe (``| head``)."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more on its way out, and must not find the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit from None


def open_table(title: str, *headings: str, caption: str = "") -> Table:
    """Return an empty table without vertical rules, whose figures would not fit into 80 columns with them.

    The first of ``headings`` is that of a name, which is never wrapped; the others are those of numbers.
    """
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left", box=box.SIMPLE_HEAD)
    table.caption = caption or None
    for at, heading in enumerate(headings):
        table.add_column(heading, justify="right" if at else "left", no_wrap=not at)
    return table


def figures_table(title: str, rows: list[tuple[str, str]]) -> Table:
    """Return a table of names and values."""
    return FiguresTable(title, rows)


def columns_table(title: str, names: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table with a column for each of ``names``."""
    table = Table(title=printable(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for number, name in enumerate(names):
        table.add_column(name, style="cyan" if number == 0 else None, no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def chosen_device(name: str, *, is_compiled: bool) -> torch.device:
    """Return the device of ``--device``. Raises DeviceError for one that is not there, or cannot do ``--compile``."""
    from psannlm.kernels.compiler import require_compiler
    from psannlm.runtime.device import pick_device

    device = pick_device(name)
    if is_compiled:
        require_compiler(device, "--compile", "leave it out")
    return device


def require_existing(option: str, *paths: Path, what: str = "file or folder") -> None:
    """Refuse, with the exit code of wrong usage, an argument that names nothing; ``-`` is stdin.

    Raises:
        ConfigError: one of ``paths`` does not exist.
    """
    from psannlm.errors import ConfigError

    for path in paths:
        if str(path) != "-" and not os.path.lexists(path):
            raise ConfigError(f"{option}: no {what} at {path} (looked from {Path.cwd()}); check the spelling")


def find_model_file(checkpoint: Path | None, runs: Path, *, hint: str = "--checkpoint", ema: bool = False) -> Path:
    """Return the checkpoint asked for with ``hint`` (of a run folder, its best), or the newest run's best.

    Args:
        ema: return the file of its averaged weights.

    Raises:
        ConfigError: ``checkpoint``, or a ``runs`` other than the default, does not exist.
        ArtifactError: there is no checkpoint in ``runs``; the message says how to make one. Or there are no averaged
            weights.
    """
    found = _find_checkpoint(checkpoint, runs, hint)
    if not ema:
        return found
    from psannlm.training.checkpoint import ema_file

    return ema_file(found)


def _find_checkpoint(checkpoint: Path | None, runs: Path, hint: str) -> Path:
    from psannlm.errors import ArtifactError
    from psannlm.training.checkpoint import find_checkpoint

    if checkpoint is not None:
        require_existing(hint, checkpoint, what="model file, checkpoint folder or run")
        return find_checkpoint(checkpoint) or checkpoint
    if runs != DEFAULT_RUNS:
        require_existing("--runs", runs)
    found = find_checkpoint(runs)
    if found is None:
        raise ArtifactError(f"no checkpoint under {runs}/; make one with: psannlm train CONFIG.yaml (or give {hint})")
    return found


@contextmanager
def drawing_a_picture() -> Iterator[None]:
    """Log a warning where a picture cannot be drawn or written: results and exit code do not depend on it."""
    from psannlm.errors import PictureError, StorageError

    try:
        yield
    except (PictureError, StorageError) as error:
        log.warning(f"note: no picture: {error}")


def model_config(**sizes: str | int) -> ModelConfig:
    """Return the configuration of a model from the size options. Raises ConfigError, which names the options."""
    from psannlm.config.model import ModelConfig
    from psannlm.config.run import section_from_kwargs

    with naming_options("model"):
        return section_from_kwargs(ModelConfig, "model", sizes)


def is_given(context: typer.Context, name: str) -> bool:
    """Whether the user gave the option on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_sizes(context: typer.Context, hint: str) -> None:
    """Refuse the size options of a model beside a checkpoint, which ``hint`` names."""
    names = ("base", "d_model", "n_layers", "n_heads", "positional_encoding", "vocab_size")
    given = ["--" + name.replace("_", "-") for name in names if is_given(context, name)]
    if given:
        raise typer.BadParameter(f"the checkpoint has sizes of its own; leave out {', '.join(given)}", param_hint=hint)


@contextmanager
def naming_options(section: str) -> Iterator[None]:
    """Name options instead of keys of a configuration file in errors about values that were given as options."""
    from psannlm.errors import ConfigError

    try:
        yield
    except ConfigError as error:
        renamed = [
            replace(problem, path="--" + problem.path.removeprefix(f"{section}.").replace("_", "-"))
            for problem in error.problems
        ]
        raise ConfigError(renamed) from error


def table_text(*tables: Table) -> str:
    """Return tables as plain text, for a file beside the figures."""
    page = io.StringIO()
    console = make_console(file=page, width=160)
    for table in tables:
        console.print(table)
    return page.getvalue()


def write_artifact(
    folder: Path,
    metrics: dict[str, Any],
    tables: Iterable[Table],
    *,
    figures_file: str = "metrics.json",
    system: dict[str, Any] | None = None,
) -> None:
    """Write the files of an artifact folder: figures, tables and, unless it is there, ``system.json``.

    Args:
        figures_file: name of the file of figures.
        system: what to write to ``system.json``; versions, machine and command line where None.

    Raises:
        StorageError: a file cannot be written.
    """
    from psannlm.io.atomic import write_text
    from psannlm.io.run_metadata import system_info, write_json

    write_json(folder / figures_file, metrics)
    if not os.path.lexists(folder / "system.json"):
        write_json(folder / "system.json", system_info() if system is None else system)
    write_text(folder / "table.txt", table_text(*tables))


def publish(
    kind: str,
    out: Path | None,
    metrics: dict[str, Any],
    tables: Sequence[Table],
    as_json: bool,
    *,
    shown: Sequence[Table] | None = None,
    draw: Callable[[Path], None] | None = None,
    folder: Path | None = None,
    figures_file: str = "metrics.json",
    system: dict[str, Any] | None = None,
    remark: str = "",
) -> Path:
    """Write the results of a command to an artifact folder, print them, and return the folder.

    Args:
        kind: which of ``reports/<kind>/<ts>`` is the folder, unless ``out`` is given.
        tables: go to ``table.txt``, and to stdout unless ``shown`` lists others.
        as_json: print ``metrics`` and the path of the folder as one JSON document instead of tables.
        draw: writes pictures to the folder; where it fails, a warning is logged and everything else is written.
        folder: a folder that this command has made before.
        figures_file, system: as in :func:`write_artifact`.
        remark: follows the path in the line that names the folder.

    Raises:
        StorageError: a file cannot be written.
    """
    from psannlm.io.run_metadata import new_folder

    folder = folder or new_folder(kind, out)
    write_artifact(folder, metrics, tables, figures_file=figures_file, system=system)
    if draw is not None:
        with drawing_a_picture():
            draw(folder)
    if as_json:
        print_json({**metrics, "folder": str(folder)})
    else:
        stdout_console().print(*(tables if shown is None else shown), sep="\n")
        print_path(f"written to {folder}{remark}")
    return folder


def keep_record(folder: Path | str, kind: str, figures: dict[str, Any], *tables: Table) -> None:
    """Write a record beside the result of a command, a folder or a URL; log a warning where other files are there."""
    from psannlm.io.records import write_record

    if not write_record(folder, kind, figures, table_text(*tables)):
        log.warning(
            f"note: no record was written: {folder} holds metrics.json, system.json or table.txt of something else"
        )

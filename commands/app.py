"""Root of the command line: subcommands, and errors as one line and an exit code."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import TracebackType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from psannlm import __version__
from psannlm.commands.options import print_message
from psannlm.display import printable
from psannlm.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    AlreadyReported,
    ConfigError,
    PsannlmError,
    RankError,
    describe,
)
from psannlm.io.limits import raise_open_files
from psannlm.runtime.cores import limit_threads
from psannlm.runtime.log import receiving_messages
from psannlm.runtime.streams import flush_output, guarding_streams, print_error_line

_ALONE_S = 10.0

# The root of the errors that parsing raises; Typer names it in no module that all of its versions have.
_WrongUsage: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class _Group(TyperGroup):
    """Lists the commands in panels, and shows the escapes in refused arguments: a glob adds file names of others."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the commands by panel, each with its first sentence; Typer's own list cuts sentences to one line."""
        panels: dict[str, list[tuple[str, str]]] = {}
        widest = max(map(len, self.commands))
        for name, command in self.commands.items():
            panel = str(getattr(command, "rich_help_panel", None) or "Commands")
            panels.setdefault(panel, []).append((name.ljust(widest), _first_sentence(command.help or "")))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _showing_escapes():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _showing_escapes():
            return super().invoke(ctx)


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"(?<=\.) ", paragraph, maxsplit=1)[0]


@contextmanager
def _showing_escapes() -> Iterator[None]:
    try:
        yield
    except _WrongUsage as error:
        message = _refused_number(error) or getattr(error, "message", None)
        if isinstance(message, str):
            error.message = printable(message, keep="\n")  # type: ignore[attr-defined]
        raise


def _refused_number(error: Exception) -> str | None:
    """Return a message about an invalid number, in place of pydantic's; None for any other error."""
    from pydantic import ValidationError

    if not isinstance(error.__cause__, ValidationError):
        return None
    problem = error.__cause__.errors()[0]
    if problem["type"] not in ("float_parsing", "int_parsing", "int_from_float"):
        return None
    from psannlm.config.advice import advice

    is_whole = problem["type"] != "float_parsing"
    kind, types = ("a whole number", (int,)) if is_whole else ("a number", (int, float))
    meant = advice(problem["input"], lambda value: type(value) in types, "whole number" if is_whole else "value")
    return f"{problem['input']!r} is not {kind}{meant}"


# Module and function of each command, by panel. Typer lists a command by its function: help loads them all.
_PANELS: dict[str, dict[str, tuple[str, str]]] = {
    "Data": {
        "init": ("init", "init"),
        "schema": ("schema", "schema"),
        "tokenize": ("tokenize", "tokenize"),
        "prep": ("prep", "prep"),
    },
    "Models": {
        "train": ("train", "train"),
        "generate": ("generate", "generate"),
        "eval": ("eval", "evaluate"),
        "export": ("export", "export"),
        "import": ("import_", "import_model"),
    },
    "Serve": {
        "serve": ("serve", "serve"),
    },
    "Measure": {
        "compare": ("compare", "compare"),
        "report": ("report", "report"),
        "bench-tokenizers": ("bench_tokenizers", "bench_tokenizers"),
        "bench-train": ("bench_train", "bench_train"),
        "bench-kv": ("bench_kv", "bench_kv"),
        "bench-serve": ("bench_serve", "bench_serve"),
        "gpu-validate": ("gpu_validate", "gpu_validate"),
    },
}


def build_app(arguments: Sequence[str] = ()) -> typer.Typer:
    """Return the command line with all commands, or with the one that ``arguments`` name, which loads no other."""
    # No option of the root takes a value, so that the first argument without a dash is the command.
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    is_known = any(named in commands for commands in _PANELS.values())
    app = typer.Typer(
        name="psannlm",
        cls=_Group,
        help="Language models with trainable sine activations: from a folder of text to a trained, measured model.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for panel, commands in _PANELS.items():
        for name, (module, function) in commands.items():
            if name == named or not is_known:
                command = getattr(import_module(f"psannlm.commands.{module}"), function)
                app.command(name, rich_help_panel=panel)(command)
    app.callback()(root)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"psannlm {__version__}")
        raise typer.Exit


def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
) -> None:
    """Options of every subcommand; ``--debug`` is removed before parsing, wherever it appears."""


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an unexpected error as one line; set as ``sys.excepthook`` unless --debug."""
    print_error_line(f"error: {describe(error)}")


def _print_error(error: PsannlmError) -> None:
    """Print an error; of several ranks that refuse a configuration for the same reason, only rank 0 prints it."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and isinstance(error, ConfigError):
        # Rank 0 prints the same and exits, and torchrun ends the others. A rank that is still alive prints its own.
        time.sleep(_ALONE_S)
    where = "" if rank == "0" or isinstance(error, RankError) else f"rank {rank}: "
    print_error_line(f"{where}{'' if error.exit_code == EXIT_INTERRUPTED else 'error: '}{describe(error)}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ends in SystemExit with one of the exit codes of ``psannlm.errors``."""
    # GNU OpenMP reads this once, when torch is imported. Threads that wait in a long loop hold the cores that others
    # wait for as soon as anything else runs: training on two cores was ten times slower (docs/research/log.md).
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    decodes = any(name in arguments[:2] for name in ("generate", "serve", "bench-kv"))
    if decodes:
        # MKL's sums depend on the alignment of a thread's scratch memory unless it is asked for reproducible ones: a
        # row would get other bits in another batch. MKL, too, reads this once.
        os.environ.setdefault("MKL_CBWR", "AUTO")
    # The servers and the engine that bench-serve starts choose for themselves.
    if "OMP_WAIT_POLICY" not in os.environ and "bench-serve" not in arguments[:2]:
        # Decoding goes through thousands of very short parallel regions per second, and loses more by sleeping.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000" if decodes else "1000")
    if "RANK" in os.environ:
        # When a rank fails, torch's C++ logs a stack for every broken connection; we print one line.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    written = arguments
    debug = "--debug" in arguments
    if debug:
        arguments = [argument for argument in arguments if argument != "--debug"]
    else:
        sys.excepthook = _one_line
    raise_open_files()
    limit_threads()
    with guarding_streams(), receiving_messages(print_message):
        try:
            _run(arguments, written)
        except PsannlmError as error:
            if debug:
                raise
            if not isinstance(error, AlreadyReported):
                _print_error(error)
            sys.exit(error.exit_code)
        except BrokenPipeError:
            # The reader of the output closed the pipe.
            sys.exit(EXIT_FAILED)
        except SystemExit as end:
            # Typer turns a Ctrl-C into this; commands that have something to save raise Interrupted instead.
            if end.code == EXIT_INTERRUPTED:
                print_error_line("interrupted")
            raise


def _run(arguments: list[str], written: list[str]) -> None:
    """Run one command, and raise StreamError where it succeeds but its output cannot be written."""
    try:
        # Not app(...): Typer's own call puts its traceback printer back in place of ours.
        typer.main.get_command(build_app(arguments))(arguments, prog_name="psannlm", obj=written)
    except SystemExit as end:
        if not end.code:
            flush_output()
        raise

"""Command line of the scripts that write synthetic corpora, with seed and size, atomically."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable

from psannlm.errors import PsannlmError
from psannlm.io.atomic import replacing


def add_text_options(parser: argparse.ArgumentParser, n_bytes: int) -> None:
    """Add the options for size (default ``n_bytes``), seed, and keeping an existing file."""
    parser.add_argument("--bytes", type=int, default=n_bytes, dest="n_bytes", help=f"at most; default: {n_bytes:,}")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--if-missing", action="store_true", help="leave a file that is there as it is")


def write_made_text(
    parser: argparse.ArgumentParser, options: argparse.Namespace, lines: Callable[[int, int], Iterable[str]]
) -> int:
    """Write ``lines(seed, n_bytes)`` as ASCII to ``options.out`` and print its name; return the exit code."""
    if options.n_bytes < 1:
        parser.error("--bytes must be 1 or more")
    if options.if_missing and options.out.exists():
        sys.stderr.write(f"{options.out} is there already\n")
        return 0
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(options.out) as temporary, open(temporary, "w", encoding="ascii") as file:
            file.writelines(lines(options.seed, options.n_bytes))
    except (PsannlmError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code if isinstance(error, PsannlmError) else 1
    sys.stderr.write(f"{options.out}: {options.out.stat().st_size:,} bytes, seed {options.seed}\n")
    return 0

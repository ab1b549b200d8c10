"""One tree of errors, each with the exit code the command line gives it.

Every message says what went wrong, where, and what to do instead. Code that meets bad input raises one of these;
only ``psannlm.commands`` turns them into text and an exit status.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from psannlm.display import shortened

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_LIMIT_MISSED = 3
EXIT_INTERRUPTED = 130


class PsannlmError(Exception):
    """Work that could not be done: the root of the tree (exit code 1)."""

    exit_code = EXIT_FAILED


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration.

    ``path`` is dotted (``train.lr``), ``line`` the 1-based line of the YAML file when the value came from one.
    """

    path: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        where = f" (line {self.line})" if self.line is not None else ""
        return f"{self.path}{where}: {self.message}"


class ConfigError(PsannlmError):
    """Wrong usage or configuration; carries every problem found, not only the first (exit code 2)."""

    exit_code = EXIT_USAGE

    def __init__(self, problems: str | Problem | Sequence[Problem], source: str | None = None) -> None:
        if isinstance(problems, str):
            problems = [Problem("", problems)]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems = tuple(problems)
        self.source = source
        lines = [str(p) if p.path else p.message for p in self.problems]
        if source is None and len(lines) == 1:
            super().__init__(lines[0])
            return
        noun = "problem" if len(lines) == 1 else "problems"
        head = f"{len(lines)} {noun}" + (f" in {source}" if source else "")
        super().__init__("\n".join([head + ":", *(f"  {line}" for line in lines)]))


class UnknownKeyError(ConfigError, TypeError):
    """A keyword argument that nothing knows: a TypeError too, which is what Python callers expect (exit code 2)."""


class CorpusError(PsannlmError):
    """Text that cannot be read or is too little to work with (exit code 2)."""

    exit_code = EXIT_USAGE


class TokenizerError(PsannlmError):
    """A tokenizer that cannot be fitted, read or applied, or that is not the one an artifact was made with."""


class ArtifactError(PsannlmError):
    """A model file or checkpoint that is missing, damaged, or of another version."""


class StorageError(PsannlmError):
    """A file that could not be written: disk full, no permission. What was there before is still there."""


class StreamError(PsannlmError):
    """A standard stream that is closed or full. What the command wrote to files is there all the same."""


class PictureError(PsannlmError):
    """A picture that cannot be drawn. The figures it would show are written and printed all the same."""


class WorkerError(PsannlmError):
    """A process that did a part of the work ended before it was done."""


class DeviceError(PsannlmError):
    """A device, precision or process group that was asked for and is not to be had (exit code 2)."""

    exit_code = EXIT_USAGE


class TrainingError(PsannlmError):
    """Training that cannot go on, such as a loss that is not finite."""


class RankError(TrainingError):
    """A training of several ranks that ends because one of them failed; the exit code is that of the failure."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class AlreadyTold(RankError):
    """The same, on a rank where there is nothing left to say: rank 0 tells what happened."""


class GenerationError(PsannlmError):
    """A prompt or sampling setting that cannot be honoured (exit code 2)."""

    exit_code = EXIT_USAGE


class LimitMissed(PsannlmError):
    """A validation measured a value beyond its limit (exit code 3)."""

    exit_code = EXIT_LIMIT_MISSED


class Interrupted(PsannlmError):
    """Stopped by the user or the scheduler; the state was saved (exit code 130)."""

    exit_code = EXIT_INTERRUPTED


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out: torch has a class of its own for GPUs and a plain one for CPUs."""
    is_named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_named or "allocate memory" in str(error)


def is_out_of_files(error: BaseException | None) -> bool:
    """Whether ``error``, or what caused it, says that this process or the system has too many files open."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return True
        error = error.__cause__
    return False


def describe(error: BaseException) -> str:
    """Return in one line what ``error`` means to a user, also where nobody expected it."""
    if is_out_of_files(error):
        message = str(error).strip().rstrip(".")
        return f"{message}. Raise the limit of open files (ulimit -n 65536), or lower --workers or --jobs."
    if isinstance(error, PsannlmError):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory; in training lower train.batch_tokens, or set train.grad_checkpoint: true"
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)):
        return f"{shortened(os.fsdecode(error.filename))}: {(error.strerror or str(error)).lower()}"
    message = str(error).strip().split("\n")[0]
    return f"unexpected {type(error).__name__}: {message} (run again with --debug for the traceback)"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known name closest to ``name`` in any case, or an empty string."""
    by_lower = {known_name.lower(): known_name for known_name in reversed(list(known))}
    matches = get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return f" (did you mean '{by_lower[matches[0]]}'?)" if matches else ""

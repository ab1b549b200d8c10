"""Exception classes of psannlm, each with the exit code of the command line.

Every message states what went wrong, where, and the remedy. Only ``psannlm.commands`` turns exceptions into text and an
exit code.
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
    """Base class of all errors that psannlm raises (exit code 1)."""

    exit_code = EXIT_FAILED


@dataclass(frozen=True)
class Problem:
    """One error in a configuration.

    ``path`` is dotted (``train.lr``), ``line`` the 1-based line of the YAML file if the value came from one.
    """

    path: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        where = f" (line {self.line})" if self.line is not None else ""
        return f"{self.path}{where}: {self.message}"


class ConfigError(PsannlmError):
    """Wrong usage or configuration, with every problem found, not only the first (exit code 2)."""

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
    """An unknown keyword argument; also a TypeError, as Python callers expect (exit code 2)."""


class CorpusError(PsannlmError):
    """Text that cannot be read, or is too short (exit code 2)."""

    exit_code = EXIT_USAGE


class TokenizerError(PsannlmError):
    """A tokenizer that cannot be trained, read or applied, or that differs from the one of an artifact."""


class ArtifactError(PsannlmError):
    """A model file or checkpoint that is missing, damaged, or of another version."""


class StorageError(PsannlmError):
    """A file that could not be written, such as on a full disk or without permission. Existing files are unchanged."""


class StreamError(PsannlmError):
    """A standard stream that is closed or full. Files that the command wrote are unaffected."""


class PictureError(PsannlmError):
    """A plot that cannot be drawn. Its values are still written and printed."""


class WorkerError(PsannlmError):
    """A worker process that ended before its work was done."""


class DeviceError(PsannlmError):
    """A device, precision or process group that was requested but is unavailable (exit code 2)."""

    exit_code = EXIT_USAGE


class TrainingError(PsannlmError):
    """Training that cannot continue, such as when memory runs out."""


class DivergedError(TrainingError):
    """A loss, gradient or parameter that is not finite, on any rank."""


class RankError(TrainingError):
    """Training on several ranks that ends because one rank failed; the exit code is that of the failed rank."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class AlreadyReported(RankError):
    """A failure that another process has already printed: this one exits without a message."""


class GenerationError(PsannlmError):
    """An invalid prompt or sampling setting (exit code 2)."""

    exit_code = EXIT_USAGE


class LimitMissed(PsannlmError):
    """A check measured a value beyond its limit (exit code 3)."""

    exit_code = EXIT_LIMIT_MISSED


class Interrupted(PsannlmError):
    """A stop by the user or the scheduler, after the state was saved (exit code 130)."""

    exit_code = EXIT_INTERRUPTED


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that memory ran out. torch has its own class for GPUs and raises RuntimeError on CPUs."""
    is_named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_named or "allocate memory" in str(error)


def is_out_of_files(error: BaseException | None) -> bool:
    """Whether ``error``, or its cause, means that this process or the system has too many open files."""
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


def install_extra(extra: str) -> str:
    """Return the command that installs an optional dependency group, for the end of an error message.

    It names the clone: the package called psannlm on the public index is another project's.
    """
    return f"run pip install -c constraints.txt '.[{extra}]' in the clone of psannlm"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known name closest to ``name``, ignoring case, or an empty string."""
    by_lower = {known_name.lower(): known_name for known_name in reversed(list(known))}
    matches = get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return f" (did you mean '{by_lower[matches[0]]}'?)" if matches else ""

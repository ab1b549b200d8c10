"""The compiler behind torch.compile on this machine: what it lacks, and whether it works."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from psannlm.errors import DeviceError
from psannlm.kernels.torch_private import inductor_cache_folder
from psannlm.runtime.device import MPS_CANNOT

_CPP_COMPILERS = ("g++", "clang++", "c++")


def missing_to_compile(device: torch.device) -> str | None:
    """Return what torch.compile lacks on ``device`` and how to install it, or None.

    On a CPU it needs a C++ compiler. On a GPU it needs Triton, which builds a small C extension for every kernel, and
    therefore a C compiler and the Python headers, which slim images lack.
    """
    if device.type == "cpu":
        found = any(map(shutil.which, _CPP_COMPILERS))
        return None if found else "a C++ compiler (install g++)"
    if find_spec("triton") is None:
        return "Triton (pip install triton)"
    named = (os.environ.get("CC") or "").split()
    if not any(shutil.which(name) for name in named[:1] or ("gcc", "clang", "cc")):
        return "a C compiler (install gcc)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python.h (install python3-dev)"
    return None


_BROKEN = "a working compiler"


@lru_cache(maxsize=4)
def trial_failure(kind: str, *, trusts_note: bool = False) -> str | None:
    """Compile a tiny function on a device of ``kind``, once per process; return the error in one line, or None.

    Only a trial detects a broken compiler, a path with a space that breaks its command line, or a cache folder without
    write or execute permission.

    Args:
        trusts_note: do without a trial, which takes seconds, where the compiler's cache folder has a note that the same
            compiler has passed one: for callers whose user asked for compilation and gets an error where it fails.
    """
    salt = time.time()  # makes the kernel unique: one from the disk cache would prove nothing

    def tiny(x: Tensor) -> Tensor:
        return x.sin() + salt

    def trial() -> None:
        if trusts_note and kind == "cpu" and has_passed_trial():
            return
        with torch.no_grad():
            torch.compile(tiny, fullgraph=True, dynamic=False)(torch.zeros(8, device=kind))
        if kind == "cpu" and (note := _note_of_success()) is not None:
            note.touch()

    return failure_of(trial, kind)


def failure_of(compilation: Callable[[], object], kind: str) -> str | None:
    """Run a compilation for a device of ``kind``; return its error in one line with a remedy, or None."""
    try:
        compilation()
    except _TRIAL_ERRORS as error:
        return f"{_BROKEN}; a trial failed: {_cause(error):.200} ({_remedy(kind)})"
    return None


def has_passed_trial() -> bool:
    """Whether the compiler's cache folder has a note that this compiler has passed a trial on this CPU."""
    note = _note_of_success()
    return note is not None and note.is_file()


def _note_of_success() -> Path | None:
    """Return the file that stands for a trial's success with this compiler, or None where the cache is not usable."""
    folder = inductor_cache_folder()
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return None
    parts = [torch.__version__, torch.__path__[0], sys.version, sysconfig.get_paths()["include"]]
    parts += [f"{name}={os.environ.get(name)}" for name in ("CXX", "CPATH", "CPLUS_INCLUDE_PATH", "TMPDIR")]
    for name in (os.environ.get("CXX") or "", *_CPP_COMPILERS):
        if (found := shutil.which(name)) is not None:
            status = Path(found).resolve().stat()
            parts.append(f"{found} {status.st_size} {status.st_mtime_ns}")
    return folder / f"psannlm-trial-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


# Errors of a compiler that is broken, cannot write, or cannot load its output; LookupError: the user has no name.
_TRIAL_ERRORS = (
    RuntimeError,
    OSError,
    ImportError,
    ValueError,
    AssertionError,
    LookupError,
    TypeError,
    AttributeError,
    subprocess.SubprocessError,
)
_COMPILER_SAYS = re.compile(r"\b(?:fatal )?error: |: cannot |not found|denied|No space left|failed to map")


def _cause(error: BaseException) -> str:
    """Return the first error line of the compiler in a failed compilation, or the first line of the exception."""
    while error.__cause__ is not None:
        error = error.__cause__
    # torch puts a line like "backend='inductor' raised:" in front of the message of another exception.
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.endswith(" raised:")]
    named = [line for line in lines if _COMPILER_SAYS.search(line) and not line.startswith("CppCompileError")]
    return (named or lines or [type(error).__name__])[0]


def _remedy(kind: str) -> str:
    places = {
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""),
        "the folder for temporary files, TMPDIR,": tempfile.gettempdir(),
        "the Python environment": torch.__path__[0],
    }
    for name, path in places.items():
        if kind == "cpu" and re.search(r"\s", path):
            remedy = "which breaks the command line of the compiler; use a path without spaces"
            return f"{name} has a space in its path, {path!r}, {remedy}"
    program = "g++" if kind == "cpu" else "gcc"
    return (
        f"check that {program} works, and that TMPDIR or TORCHINDUCTOR_CACHE_DIR names a folder with write and execute "
        "permission"
    )


def has_compiler(device: torch.device) -> bool:
    """Whether the requirements of torch.compile on ``device`` are installed."""
    return missing_to_compile(device) is None


def compiler_fault(device: torch.device) -> str | None:
    """Return what is missing or broken for torch.compile on ``device``, or None."""
    return missing_to_compile(device) or trial_failure(device.type)


def require_compiler(device: torch.device, asked: str = "compile: true", instead: str = "set compile: false") -> None:
    """Raise DeviceError if torch.compile does not work on ``device``.

    Args:
        asked: the requested setting, for the message.
        instead: the alternative, for the message.
    """
    if device.type == "mps":
        raise DeviceError(f"{asked} with device mps: {MPS_CANNOT}; {instead}")
    fault = missing_to_compile(device) or trial_failure(device.type, trusts_note=True)
    if fault is not None:
        remedy = "repair it" if fault.startswith(_BROKEN) else "which is missing; install it"
        raise DeviceError(f"{asked} needs {fault}{';' if remedy == 'repair it' else ','} {remedy}, or {instead}")

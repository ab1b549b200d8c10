"""Commands for Python subprocesses with the import path of this process, without the working folder.

``python -c`` and ``python -m`` put the working folder first on the import path, so that a file there with the name of a
library would be run in its place. ``python -P`` prevents that from Python 3.11 on; passing the path works everywhere.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from pathlib import Path

_PACKAGE = "psannlm"
_PR_SET_PDEATHSIG = 1


def import_path() -> list[str]:
    """Return ``sys.path`` without the working folder, unless ``PYTHONPATH`` or a .pth file names it."""
    here = os.path.realpath(os.getcwd())
    named = {os.path.realpath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry}
    library = os.path.dirname(os.__file__)
    is_installed, path = False, []
    for entry in sys.path:
        # Entries of .pth files come after the standard library.
        is_installed |= entry == library
        is_here = entry == "" or os.path.realpath(entry) == here
        if not is_here or (entry != "" and (is_installed or here in named)):
            path.append(entry)
    root = str(Path(__file__).resolve().parents[2])
    # For a checkout that is not installed. It comes last, so that it hides no library.
    return path if _is_found(path) else [*path, root]


def python_command(module: str, *arguments: str, end_with_parent: bool = False) -> list[str]:
    """Return the command that runs ``module`` as ``python -m`` would, with this process's import path.

    Args:
        arguments: ``sys.argv[1:]`` of the module.
        end_with_parent: the system sends the process SIGTERM when this one ends in any way (Linux only).
    """
    watch = f"from psannlm.runtime.processes import end_with; end_with({os.getpid()}); " if end_with_parent else ""
    run = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return python_program(watch + run, *arguments)


def python_program(program: str, *arguments: str) -> list[str]:
    """Return the command that runs the Python code ``program`` with this process's import path."""
    flags = [
        letter
        for letter, is_set in (
            ("-I", sys.flags.isolated),
            ("-E", sys.flags.ignore_environment and not sys.flags.isolated),
            ("-s", sys.flags.no_user_site and not sys.flags.isolated),
        )
        if is_set
    ]
    # sys is built in, so that nothing is imported before the path is set.
    return [sys.executable, *flags, "-c", f"import sys; sys.path[:] = {import_path()!a}; {program}", *arguments]


def end_with(parent: int, number: int = signal.SIGTERM) -> None:
    """Let the system send ``number`` to this process when its parent process ``parent`` ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit()


def _is_found(path: list[str]) -> bool:
    """Whether a process with ``path`` can import psannlm, by the path or by the finder of an editable installation."""
    if PathFinder.find_spec(_PACKAGE, path) is not None:
        return True
    others = [finder for finder in sys.meta_path if finder not in (BuiltinImporter, FrozenImporter, PathFinder)]
    return any(finder.find_spec(_PACKAGE, None) is not None for finder in others)

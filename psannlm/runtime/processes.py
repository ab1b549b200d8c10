"""Python processes that import what this one imports: from the same path, and nothing from the working folder.

Python puts the working folder, or ``''`` for it, in front of everything else on the path of ``python -c`` and ``python
-m``. A file there that bears the name of a library would be run in its place. ``python -P`` leaves the folder out from
Python 3.11 on; here the path is handed over, which works everywhere.
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
    """Return ``sys.path`` without the working folder, which stays only where ``PYTHONPATH`` or a .pth file names it."""
    here = os.path.realpath(os.getcwd())
    named = {os.path.realpath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry}
    library = os.path.dirname(os.__file__)
    is_installed, path = False, []
    for entry in sys.path:
        # What .pth files name stands behind the standard library.
        is_installed |= entry == library
        is_here = entry == "" or os.path.realpath(entry) == here
        if not is_here or (entry != "" and (is_installed or here in named)):
            path.append(entry)
    root = str(Path(__file__).resolve().parents[2])
    # A checkout that is used without being installed; as the last of all, it hides no library.
    return path if _is_found(path) else [*path, root]


def python_command(module: str, *arguments: str, end_with_parent: bool = False) -> list[str]:
    """Return the command that runs ``module`` as ``python -m`` would, with this process's import path.

    Args:
        arguments: of the module, its ``sys.argv[1:]``.
        end_with_parent: also have the system send it SIGTERM when this process ends, however it ends (Linux).
    """
    watch = f"from psannlm.runtime.processes import end_with; end_with({os.getpid()}); " if end_with_parent else ""
    run = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return python_program(watch + run, *arguments)


def python_program(program: str, *arguments: str) -> list[str]:
    """Return the command that runs ``program``, Python code, with this process's import path."""
    flags = [
        letter
        for letter, is_set in (
            ("-I", sys.flags.isolated),
            ("-E", sys.flags.ignore_environment and not sys.flags.isolated),
            ("-s", sys.flags.no_user_site and not sys.flags.isolated),
        )
        if is_set
    ]
    # sys is built in: nothing is looked up before the path is right.
    return [sys.executable, *flags, "-c", f"import sys; sys.path[:] = {import_path()!a}; {program}", *arguments]


def end_with(parent: int, number: int = signal.SIGTERM) -> None:
    """Have the system send this process the signal ``number`` when process ``parent``, which started it, ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit()


def _is_found(path: list[str]) -> bool:
    """Whether a process with ``path`` finds this package, by the path or by the finder of an editable installation."""
    if PathFinder.find_spec(_PACKAGE, path) is not None:
        return True
    others = [finder for finder in sys.meta_path if finder not in (BuiltinImporter, FrozenImporter, PathFinder)]
    return any(finder.find_spec(_PACKAGE, None) is not None for finder in others)

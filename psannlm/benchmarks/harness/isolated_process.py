"""A function and its arguments in; an object that lives in a process of its own, called from here, out.

What such a process holds at its highest is told by the system, and no neighbour adds to it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from psannlm.errors import PsannlmError, WorkerError
from psannlm.runtime.processes import end_with, python_program

_STATUS = Path("/proc/self/status")
_JOIN_S = 10.0
# Ctrl-C ends it at once, also while it imports.
_PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "from psannlm.benchmarks.harness.isolated_process import main; main()"
)


class IsolatedProcess:
    """``build(*arguments)``, made in a new process; leave the context to end it.

    Args:
        build: a function of a module, so that the other process finds it.
        environment: variables that are set there before anything else happens.
    """

    def __init__(
        self, build: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # Not multiprocessing: forked, it would start with all that is in memory here, and spawned, with the working
            # folder on its import path.
            self._process = subprocess.Popen(
                python_program(_PROGRAM, str(theirs.fileno()), str(os.getpid())),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **(environment or {})},
            )
        self._connection = Connection(ours.detach())
        self._ask((build, arguments))

    def call(self, method: str, *arguments: Any) -> Any:
        """Return what ``method`` of the object gives.

        Raises:
            PsannlmError: as the method raised it.
            WorkerError: the process ended, or met an error that nobody expected.
        """
        return self._ask((method, arguments))

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        try:
            self._process.wait(_JOIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> IsolatedProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, question: tuple[Any, tuple[Any, ...]]) -> Any:
        try:
            self._connection.send(question)
            is_good, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self.close()
            reason = f"exit code {self._process.returncode}"
            raise WorkerError(f"a process that measures ended early ({reason}); was it out of memory?") from error
        if is_good:
            return answer
        self.close()
        raise answer


def main() -> None:
    """Serve until the connection ends; ``sys.argv`` holds its file descriptor and the parent's process id."""
    end_with(int(sys.argv[2]))
    with Connection(int(sys.argv[1])) as connection:
        _serve(connection)


def _serve(connection: Connection) -> None:
    target: Any = None
    while True:
        try:
            what, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = getattr(target, what)(*arguments) if isinstance(what, str) else what(*arguments)
            if target is None:
                target, answer = answer, None
            connection.send((True, answer))
        except PsannlmError as error:
            connection.send((False, error))
        except Exception:  # noqa: BLE001  whatever it was, it must reach the process that asked
            connection.send((False, WorkerError(f"a process that measures failed:\n{traceback.format_exc()}")))


def peak_bytes() -> int:
    """Return the highest resident memory of this process so far."""
    if _STATUS.is_file():
        # getrusage would count what the parent held when it started this process.
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024

"""Object in a subprocess of its own, whose methods are called over a socket, for memory measurements in isolation."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from psannlm.errors import PsannlmError, WorkerError
from psannlm.runtime.processes import end_with, python_program

_JOIN_S = 10.0
# Ctrl-C ends the process at once, even during imports.
_PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "from psannlm.benchmarks.harness.isolated_process import main; main()"
)


class IsolatedProcess:
    """The object ``build(*arguments)`` in a new process; leaving the context ends the process.

    Args:
        build: a module-level function or class, which the other process imports.
        environment: environment variables of the new process.
    """

    def __init__(
        self, build: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # Not multiprocessing: a forked process would hold the memory of this one, and a spawned one would have the
            # working folder on its import path.
            self._process = subprocess.Popen(
                python_program(_PROGRAM, str(theirs.fileno()), str(os.getpid())),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **(environment or {})},
            )
        self._connection = Connection(ours.detach())
        self._request((build, arguments))

    def call(self, method: str, *arguments: Any) -> Any:
        """Call ``method`` of the object and return its result.

        Raises:
            PsannlmError: raised by the method.
            WorkerError: the process ended, or the method raised another error; the message holds its traceback.
        """
        return self._request((method, arguments))

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

    def _request(self, message: tuple[Any, tuple[Any, ...]]) -> Any:
        try:
            self._connection.send(message)
            is_good, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self.close()
            reason = f"exit code {self._process.returncode}"
            raise WorkerError(f"a measuring process ended early ({reason}); it may have run out of memory") from error
        if is_good:
            return answer
        self.close()
        raise answer


def main() -> None:
    """Serve calls until the connection closes; ``sys.argv`` holds its file descriptor and the parent's process id."""
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
        except Exception:  # noqa: BLE001 - any error must reach the calling process, which raises it with this traceback
            connection.send((False, WorkerError(f"a measuring process failed:\n{traceback.format_exc()}")))

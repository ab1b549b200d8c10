"""The process that speaks HTTP: its start beside the engine's process, and its main function. Without torch."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from types import TracebackType

from psannlm.errors import ConfigError, WorkerError, install_extra
from psannlm.runtime.malloc import trim_aggressively
from psannlm.runtime.processes import end_with, python_program
from psannlm.serving.engine_client import EngineClient
from psannlm.serving.messages import RequestLimits

_PROGRAM = "from psannlm.serving.http_process import main; main()"
_END_S = 10.0
# Packages of the extra `serve`, which the process imports.
_PACKAGES = ("starlette", "uvicorn", "h11", "prometheus_client")


def require_packages() -> None:
    """Raise ConfigError where a package of the extra ``serve`` is missing."""
    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise ConfigError(f"the server needs {', '.join(missing)}; {install_extra('serve')}")


@dataclass(frozen=True)
class HttpSettings:
    """What the HTTP process needs to know.

    Attributes:
        model: name of the model.
        tokenizer: the content of its tokenizer's file.
        limits: what a sequence must keep to.
        max_batch: most sequences that decode at a time.
        max_queue: most sequences that wait.
        max_tokens: most new tokens of a sequence.
        host: what the server listens on.
        allowed_hosts: further names that lead to it.
        key: the API key; None: none is needed.
        has_metrics: whether ``/metrics`` is served.
        has_page: whether ``/`` is the page.
        created: when the server started, in seconds since 1970.
    """

    model: str
    tokenizer: bytes
    limits: RequestLimits
    max_batch: int
    max_queue: int
    max_tokens: int
    host: str
    allowed_hosts: tuple[str, ...] = ()
    key: str | None = None
    has_metrics: bool = False
    has_page: bool = True
    created: int = 0


class HttpProcess:
    """The HTTP process, as its parent process sees it.

    Args:
        listening: the socket that it accepts connections from.

    Attributes:
        connection: to its :class:`psannlm.serving.engine_client.EngineClient`.
    """

    def __init__(self, settings: HttpSettings, listening: socket.socket) -> None:
        ours, theirs = socket.socketpair()
        handles = (theirs.fileno(), listening.fileno())
        with theirs:
            # A session of its own: Ctrl-C reaches only the parent, which asks this process to end.
            self._process = subprocess.Popen(
                python_program(_PROGRAM, *map(str, handles), str(os.getpid())),
                stdin=subprocess.DEVNULL,
                pass_fds=handles,
                start_new_session=True,
            )
        self.connection = Connection(ours.detach())
        # Not in the command line, which every user of the machine can read: it holds the key.
        self.connection.send(settings)

    def end(self) -> None:
        """Close the connection, on which the process ends, and wait for it.

        Raises:
            WorkerError: it failed, or did not end.
        """
        self.connection.close()
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if code:
            how = f"exit code {code}" if code > 0 else f"signal {-code} ({signal.Signals(-code).name})"
            raise WorkerError(f"the HTTP process of the server ended with {how}; start the server again")

    def __enter__(self) -> HttpProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.end()
        except WorkerError:
            # Of two failures the first is reported.
            if error is None:
                raise


class _ToParent(logging.Handler):
    """Lets the engine's process log a message, as its user asked for.

    Of an exception its kind and place are logged: its message may hold a prompt. A request that is cut off is none.
    """

    def __init__(self, engine: EngineClient) -> None:
        super().__init__(logging.INFO)
        self._engine = engine

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage().strip()
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, asyncio.CancelledError):
            return
        if error is not None:
            frames = traceback.extract_tb(error.__traceback__)
            where = f" at {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
            message = f"{message}: {type(error).__name__}{where}"
        self._engine.report("log", (record.levelno, "%s", message))


def main() -> None:
    """Serve HTTP; ``sys.argv``: the descriptors of connection and listening socket, and the parent's process id."""
    # What ends a group of processes reaches this one too; the parent got it, and says when to end.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with(int(sys.argv[3]), signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trim_aggressively()
    connection, listening = Connection(int(sys.argv[1])), socket.socket(fileno=int(sys.argv[2]))
    try:
        settings: HttpSettings = connection.recv()
    except EOFError:
        return

    from psannlm.serving.guard import HostRule
    from psannlm.serving.metrics import Metrics
    from psannlm.serving.server import HttpServer
    from psannlm.serving.service import Service
    from psannlm.tokenizers.resolve import tokenizer_from_bytes

    engine = EngineClient(connection, settings.limits, max_batch=settings.max_batch, max_queue=settings.max_queue)
    # Of uvicorn errors only: a warning for every malformed request would let anyone fill the log.
    for name, level in (("psannlm", logging.INFO), ("uvicorn", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.propagate = False
        logger.addHandler(_ToParent(engine))
    service = Service(
        model=settings.model,
        tokenizer=tokenizer_from_bytes(settings.tokenizer),
        context=settings.limits.context,
        max_tokens=settings.max_tokens,
        engine=engine,
        metrics=Metrics() if settings.has_metrics else None,
        has_page=settings.has_page,
        created=settings.created,
    )
    HttpServer(service, listening, HostRule(settings.host, settings.allowed_hosts), settings.key).run()

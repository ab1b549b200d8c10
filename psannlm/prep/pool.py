"""Pools that encode chunks: their common part, and the pool of processes on this machine.

A pool of processes has a one-line error for a process that dies. ``ray_pool`` holds the pool of a Ray cluster.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from psannlm.errors import Interrupted, PsannlmError, WorkerError
from psannlm.prep.chunks import Chunk
from psannlm.prep.encode_worker import ERRORS, ONE_THREAD
from psannlm.prep.job import PrepSettings
from psannlm.prep.reader import CorpusReader, Cut, Drops, SourceFile
from psannlm.runtime.processes import python_program

_PROGRAM = "from psannlm.prep.encode_worker import main; sys.exit(main())"
WAIT_S = 0.1
_END_S = 5.0


class _Worker:
    """A process and the connection to it."""

    def __init__(self, setup: bytes, tokenizer: bytes) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = python_program(_PROGRAM, str(theirs.fileno()), str(os.getpid()))
            # A session of its own: Ctrl-C reaches only the parent, which lets workers finish their chunks.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, **ONE_THREAD},
            )
        self.connection = Connection(ours.detach())
        self._first = [setup, tokenizer]

    def ask(self, chunk: Chunk) -> dict[str, Any]:
        """Send a chunk and wait for the answer. Raises EOFError or OSError if the process has ended."""
        while self._first:
            self.connection.send_bytes(self._first.pop(0))
        self.connection.send_bytes(chunk.header())
        self.connection.send_bytes(chunk.payload)
        answer: dict[str, Any] = json.loads(self.connection.recv_bytes())
        return answer

    def death(self) -> WorkerError:
        """Return an error with the exit status or signal of the process."""
        try:
            code = self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        how = f"ended with status {code}"
        if code < 0:
            how = f"was ended by signal {-code} ({signal.Signals(-code).name})"
            if -code == signal.SIGKILL:
                how += ", as the system does when memory runs out"
        return WorkerError(
            f"a worker process {how}. Finished chunks are kept: run the same command to resume; fewer --workers need "
            "less memory"
        )


class ChunkPool(ABC):
    """Context manager that encodes chunks on workers; ``_answers`` holds what they answered, by chunk index."""

    def __init__(self) -> None:
        self._answers: queue.Queue[tuple[int, dict[str, Any] | PsannlmError]] = queue.Queue()
        self._failures: list[tuple[int, PsannlmError]] = []
        self._n_open = 0

    @abstractmethod
    def __enter__(self) -> ChunkPool: ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def reader(
        self,
        sources: Sequence[SourceFile],
        indices: Sequence[int],
        settings: PrepSettings,
        chunk_bytes: int,
        drops: Drops,
        cut: Cut | None,
        raise_if_stopped: Callable[[], None],
    ) -> CorpusReader:
        """Return the reader of the corpus, whose sections become the chunks; this process reads it."""
        return CorpusReader(sources, indices, settings, chunk_bytes, drops, cut)

    def encode(
        self, chunks: Iterable[Chunk], done: Callable[[int, dict[str, Any]], None], stop: Callable[[], bool]
    ) -> None:
        """Encode every chunk; ``done(index, figures)`` is called for each, in any order.

        Raises:
            PsannlmError: the first error in the order of the chunks; earlier chunks are encoded.
            Interrupted: ``stop()`` is true; chunks that were being encoded are finished.
        """
        try:
            for chunk in chunks:
                while not self._put(chunk):
                    self._collect(done)
                    self._raise_if_stopped(stop)
                self._collect(done)
                self._raise_if_stopped(stop)
            while self._n_open:
                self._collect(done, wait=True)
                self._raise_if_stopped(stop)
        except PsannlmError:
            self._drop_tasks()
            while self._n_open:
                self._collect(done, wait=True)
            if self._failures:
                raise min(self._failures, key=lambda failure: failure[0])[1] from None
            raise

    @abstractmethod
    def _put(self, chunk: Chunk) -> bool:
        """Send a chunk to a worker within 0.1 s and count it in ``_n_open``; return whether it was accepted."""

    @abstractmethod
    def _drop_tasks(self) -> None:
        """Take back, after an error or a stop, the chunks that no worker has begun: ``_n_open`` counts the others."""

    def _raise_if_stopped(self, stop: Callable[[], bool]) -> None:
        if self._failures:
            raise self._failures[0][1]
        if stop():
            raise Interrupted("interrupted")

    def _collect(self, done: Callable[[int, dict[str, Any]], None], wait: bool = False) -> None:
        """Process the answers that are available; with ``wait``, wait up to 0.1 s for the first."""
        while True:
            try:
                index, answer = self._answers.get(wait, WAIT_S)
            except queue.Empty:
                return
            wait = False
            self._n_open -= 1
            if isinstance(answer, PsannlmError):
                self._failures.append((index, answer))
            elif "error" in answer:
                self._failures.append((index, ERRORS[answer["error"]](answer["message"])))
            else:
                done(index, answer)


class WorkerPool(ChunkPool):
    """Context manager of ``n_workers`` processes. Raises WorkerError if one cannot be started."""

    def __init__(self, n_workers: int, setup: bytes, tokenizer: bytes) -> None:
        super().__init__()
        self._workers: list[_Worker] = []
        self._threads: list[threading.Thread] = []
        self._tasks: queue.Queue[Chunk | None] = queue.Queue(maxsize=2)
        try:
            for _ in range(n_workers):
                self._workers.append(_Worker(setup, tokenizer))
        except OSError as error:
            self._end()
            raise WorkerError(f"a worker process could not be started: {error.strerror or error}") from error

    def __enter__(self) -> WorkerPool:
        for worker in self._workers:
            thread = threading.Thread(target=self._serve, args=(worker,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _put(self, chunk: Chunk) -> bool:
        try:
            self._tasks.put(chunk, timeout=WAIT_S)
        except queue.Full:
            return False
        self._n_open += 1
        return True

    def _drop_tasks(self) -> None:
        while True:
            try:
                self._tasks.get_nowait()
            except queue.Empty:
                return
            self._n_open -= 1

    def _serve(self, worker: _Worker) -> None:
        while (chunk := self._tasks.get()) is not None:
            try:
                self._answers.put((chunk.index, worker.ask(chunk)))
            except (EOFError, OSError):
                self._answers.put((chunk.index, worker.death()))
                return
        self._tasks.put(None)  # for the next thread

    def _end(self) -> None:
        """Kill every worker; an unfinished chunk is encoded again when the preparation is resumed."""
        for worker in self._workers:
            worker.process.kill()
        self._drop_tasks()
        self._tasks.put(None)
        for worker in self._workers:
            worker.process.wait()
        for thread in self._threads:
            thread.join(_END_S)
        for worker in self._workers:
            worker.connection.close()

"""The engine as the HTTP process sees it: sequences are submitted over a connection, and their updates come back.

HTTP has a process of its own, without torch, because what Python does for one of them would stop the other: a thread
that computes gives up the interpreter only between two operations, of which a decoding step has hundreds.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

from psannlm.errors import PsannlmError
from psannlm.serving.messages import Counters, GenerationRequest, RequestLimits, Update


class QueueFullError(PsannlmError):
    """A queue without space for another sequence."""


class EngineClient:
    """The engine's process, for the event loop of the HTTP process.

    Args:
        connection: to :class:`psannlm.serving.engine_host.EngineHost`; closed when the engine is lost.
        limits: what a sequence must keep to.
        max_batch: most sequences that decode at a time.
        max_queue: most sequences that wait.

    Attributes:
        is_ready: whether the engine is prepared.
    """

    def __init__(self, connection: Connection, limits: RequestLimits, *, max_batch: int, max_queue: int) -> None:
        self.limits, self._max_batch, self._max_queue = limits, max_batch, max_queue
        self.is_ready = False
        self._connection, self._sending = connection, threading.Lock()
        self._numbers = count()
        # Of each open sequence: what to call with an update, and once the updates of a step are out.
        self._open: dict[int, tuple[Callable[[Update], None], Callable[[], None]]] = {}
        # What to call with each answer to the question for counters, in order.
        self._asked_counters: deque[Callable[[Counters], None]] = deque()
        self._n_ended, self._began_s = 0, time.monotonic()

    @property
    def max_open(self) -> int:
        """Most sequences that decode or wait."""
        return self._max_batch + self._max_queue

    @property
    def n_open(self) -> int:
        """Sequences that decode or wait."""
        return len(self._open)

    @property
    def has_work(self) -> bool:
        """Whether a sequence is open."""
        return bool(self._open)

    def receive(self, on_message: Callable[[str], None]) -> None:
        """Take messages until the engine's process closes the connection, in a thread of its own.

        Args:
            on_message: called with every message that is not an update: ``ready``, ``drain``, ``end_drain`` and,
                when the engine has failed, its process has ended or a message could not be taken, ``end``.
        """
        try:
            while True:
                kind, content = self._connection.recv()
                if kind == "updates":
                    self._update(content)
                elif kind == "counters":
                    self._asked_counters.popleft()(content)
                else:
                    self.is_ready = self.is_ready or kind == "ready"
                    on_message(kind)
        except (EOFError, OSError):
            pass
        finally:
            on_message("end")

    def _update(self, updates: list[tuple[int, Update]]) -> None:
        informed: dict[Callable[[], None], None] = {}
        for number, update in updates:
            if (listening := self._open.get(number)) is None:
                # Cancelled meanwhile.
                continue
            on_update, after_updates = listening
            if update.is_last:
                self._open.pop(number, None)
                self._n_ended += 1
            on_update(update)
            informed[after_updates] = None
        for after_updates in informed:
            after_updates()

    def submit(
        self,
        requests: Sequence[GenerationRequest],
        on_update: Callable[[int, Update], None],
        after_updates: Callable[[], None] = lambda: None,
    ) -> list[int]:
        """Queue sequences, all or none, and return their numbers.

        Args:
            on_update: called in the thread of :meth:`receive` with (number in ``requests``, what steps have added).
            after_updates: called in that thread once all updates of a step are out.

        Raises:
            GenerationError: a request is refused.
            QueueFullError: the queue has no space for all of them.
        """
        for request in requests:
            self.limits.check(request)
        if len(self._open) + len(requests) > self.max_open:
            n_waiting = max(0, len(self._open) - self._max_batch)
            raise QueueFullError(f"{n_waiting} sequence{'s wait' if n_waiting != 1 else ' waits'}; try again later")

        def listener(index: int) -> Callable[[Update], None]:
            return lambda update: on_update(index, update)

        numbers = [next(self._numbers) for _ in requests]
        self._open.update({number: (listener(index), after_updates) for index, number in enumerate(numbers)})
        self._send("submit", list(zip(numbers, requests, strict=True)))
        return numbers

    def cancel(self, numbers: Sequence[int]) -> None:
        """Drop sequences: the engine's next step frees their rows."""
        for number in numbers:
            self._open.pop(number, None)
        self._send("cancel", list(numbers))

    async def counters(self) -> Counters:
        """Return the engine's figures."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Counters] = loop.create_future()

        def take(counters: Counters) -> None:
            if not found.done():
                found.set_result(counters)

        def pass_on(counters: Counters) -> None:
            loop.call_soon_threadsafe(take, counters)

        self._asked_counters.append(pass_on)
        self._send("counters", None)
        return await found

    def cut_off(self) -> None:
        """Let the engine end all sequences with an error."""
        self._send("cut_off", None)

    def close(self) -> None:
        """End the connection, also for the thread that reads it."""
        with socket.socket(fileno=os.dup(self._connection.fileno())) as both_ends:
            both_ends.shutdown(socket.SHUT_RDWR)

    def report(self, kind: str, content: Any = None) -> None:
        """Send what the engine's process shows its user: ``serving``, or ``log`` with arguments for ``Logger.log``."""
        self._send(kind, content)

    def expected_wait_s(self) -> int:
        """Return whole seconds, 1 to 60, in which the waiting sequences may have got a row."""
        elapsed_s = max(time.monotonic() - self._began_s, 1e-9)
        per_s, n_waiting = self._n_ended / elapsed_s, max(0, len(self._open) - self._max_batch)
        return min(60, max(1, round(n_waiting / per_s))) if per_s else 1

    def _send(self, kind: str, content: Any) -> None:
        try:
            with self._sending:
                self._connection.send((kind, content))
        except OSError:
            # The engine's process has ended: `receive` finds it out too, and ends this one.
            pass

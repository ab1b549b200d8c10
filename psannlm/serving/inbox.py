"""Messages from the thread that reads the engine's updates to the event loop, which is woken once for each step."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any


class Inbox:
    """Messages to queues of one event loop, in order.

    Waking the loop is a system call for the sender and another turn of the loop for the receiver, and a loop that is
    woken competes with the sender for the interpreter.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._messages: deque[tuple[asyncio.Queue[Any], Any]] = deque()

    def put(self, queue: asyncio.Queue[Any], message: Any) -> None:
        """Hold ``message`` for an unbounded ``queue`` of the loop until :meth:`deliver`."""
        self._messages.append((queue, message))

    def deliver(self) -> None:
        """Put the messages into their queues; for any thread."""
        self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._messages:
            queue, message = self._messages.popleft()
            queue.put_nowait(message)

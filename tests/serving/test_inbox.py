"""Messages from another thread to an event loop: all, in order, and few times that it is woken."""

from __future__ import annotations

import asyncio
import threading

import pytest

from psannlm.serving.inbox import Inbox


def test_inbox_delivers_all_messages_in_order() -> None:
    """However the two threads interleave."""

    async def run() -> list[list[int]]:
        inbox = Inbox(asyncio.get_running_loop())
        queues: list[asyncio.Queue[int]] = [asyncio.Queue() for _ in range(3)]

        def send() -> None:
            for number in range(3000):
                inbox.put(queues[number % 3], number)
                if number % 7 == 0 or number == 2999:
                    inbox.deliver()

        thread = threading.Thread(target=send)
        thread.start()
        got = [[await asyncio.wait_for(queue.get(), 10.0) for _ in range(1000)] for queue in queues]
        thread.join()
        return got

    assert asyncio.run(run()) == [list(range(first, 3000, 3)) for first in range(3)]


def test_inbox_wakes_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> int:
        loop, n_wakes = asyncio.get_running_loop(), 0
        wake = loop.call_soon_threadsafe

        def counted(*arguments: object) -> object:
            nonlocal n_wakes
            n_wakes += 1
            return wake(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        inbox, queue = Inbox(loop), asyncio.Queue[int]()
        for _ in range(2):
            for number in range(16):
                inbox.put(queue, number)
            assert queue.empty()
            inbox.deliver()
            assert [await queue.get() for _ in range(16)] == list(range(16))
        return n_wakes

    assert asyncio.run(run()) == 2

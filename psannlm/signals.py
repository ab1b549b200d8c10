"""Ctrl-C and SIGTERM to a flag that the loop looks at between two steps."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# One Ctrl-C comes twice under torchrun: from the terminal, which tells the whole group, and from torchrun.
_ECHO_S = 1.0


@contextmanager
def stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    """Set ``stop`` on Ctrl-C or SIGTERM within the context; a second Ctrl-C, a second later or more, ends at once.

    Only the main thread of a program can handle signals; elsewhere the context does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = (signal.SIGINT, signal.SIGTERM)
    former = {name: signal.getsignal(name) for name in names}

    first: float | None = None

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first is None:
            first = now
            stop.set()
        elif number == signal.SIGINT and now - first >= _ECHO_S:
            signal.default_int_handler(number, frame)

    for name in names:
        signal.signal(name, note)
    try:
        yield
    finally:
        for name, handler in former.items():
            signal.signal(name, handler)

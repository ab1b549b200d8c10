"""Ctrl-C and SIGTERM to a flag that the loop looks at between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    """Set ``stop`` on Ctrl-C or SIGTERM within the context; a second Ctrl-C ends at once.

    Only the main thread of a program can handle signals; elsewhere the context does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = (signal.SIGINT, signal.SIGTERM)
    former = {name: signal.getsignal(name) for name in names}

    def note(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for name in names:
        signal.signal(name, note)
    try:
        yield
    finally:
        for name, handler in former.items():
            signal.signal(name, handler)

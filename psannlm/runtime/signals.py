"""Ctrl-C, SIGTERM and SIGHUP to a flag that the loop looks at between two steps."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from psannlm.runtime.streams import bearing_loss

# One Ctrl-C comes twice where it reaches a whole group of processes and one of them passes it on.
_ECHO_S = 1.0


def stop_signals() -> list[signal.Signals]:
    """Return the signals that ask for an end: Ctrl-C, SIGTERM, and SIGHUP, which a lost terminal or connection sends.

    SIGHUP is left out where it is ignored, as under ``nohup``.
    """
    is_heard = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if is_heard else [])]


@contextmanager
def stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    """Set ``stop`` on Ctrl-C, SIGTERM or SIGHUP within the context; a second Ctrl-C, a second later, ends at once.

    Output that nobody reads any more, of a terminal that was closed or a connection that was lost, sets it too, and is
    dropped from then on: what is to be saved is saved. Under ``nohup`` it is only dropped.

    Only the main thread of a program can handle signals; elsewhere the context does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = stop_signals()
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

    def lose() -> None:
        if signal.SIGHUP in names:
            stop.set()

    for name in names:
        signal.signal(name, note)
    try:
        with bearing_loss(lose):
            yield
    finally:
        for name, handler in former.items():
            signal.signal(name, handler)

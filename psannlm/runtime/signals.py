"""Signal handlers: a stop flag on Ctrl-C, SIGTERM and SIGHUP, checked between two steps, and a delayed Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from psannlm.runtime.streams import discarding_lost_output

# One Ctrl-C arrives twice if it reaches a group of processes and one of them forwards it.
_ECHO_S = 1.0
# Windows has no such signal.
_HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)


def stop_signals() -> list[signal.Signals]:
    """Return the stop signals: SIGINT, SIGTERM, and SIGHUP, which a closed terminal or connection sends.

    SIGHUP is left out if it is ignored, as under ``nohup``, or does not exist.
    """
    is_handled = _HANGUP is not None and signal.getsignal(_HANGUP) != signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([_HANGUP] if _HANGUP is not None and is_handled else [])]


@contextmanager
def stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    """Set ``stop`` on Ctrl-C, SIGTERM or SIGHUP within the context; a Ctrl-C a second later interrupts at once.

    Output to a closed terminal or a lost connection also sets it, and further output is discarded, so that the state
    can be saved. Under ``nohup`` such output is only discarded.

    Only the main thread can handle signals; in other threads the context does nothing.
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
        if _HANGUP in names:
            stop.set()

    for name in names:
        signal.signal(name, note)
    try:
        with discarding_lost_output(lose):
            yield
    finally:
        for name, handler in former.items():
            signal.signal(name, handler)


@contextmanager
def delaying_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt for a Ctrl-C within the context at its end.

    For code that runs destructors: Python drops exceptions in them, and the interrupt would be lost. Other threads than
    the main thread get no interrupts; in them the context does nothing.
    """
    former = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(former):
        yield
        return
    frames: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda number, frame: frames.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
    if frames:
        former(signal.SIGINT, frames[0])

"""Live line of progress on a console."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from psannlm.display import printable
from psannlm.runtime.consoles import print_line


class LiveLine:
    """Progress of the work: one line that is rewritten on a terminal, elsewhere a plain line every few seconds.

    Drawn by the working thread, at most once per second: a second thread would disturb measurements.
    """

    _REDRAW_S = 1.0
    _PLAIN_S = 5.0

    def __init__(self, console: Console, live: Live | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._live, self._clock = console, live, clock
        self._interval = self._PLAIN_S if live is None else self._REDRAW_S
        # The first plain line comes early, so that the user sees that work is in progress.
        self._next = clock() + self._REDRAW_S

    def show(self, progress: object) -> None:
        """Replace the line by the text of ``progress``, unless it was replaced a moment ago."""
        now = self._clock()
        if now < self._next:
            return
        self._next = now + self._interval
        if self._live is None:
            print_line(self._console, progress)
        else:
            self._live.update(Text(printable(progress), no_wrap=True, overflow="ellipsis"), refresh=True)


@contextmanager
def live_line(console: Console) -> Iterator[LiveLine]:
    """Yield a :class:`LiveLine` on ``console``; it is gone from a terminal at the end."""
    if not (console.is_terminal and console.is_interactive):
        yield LiveLine(console, None)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield LiveLine(console, live)

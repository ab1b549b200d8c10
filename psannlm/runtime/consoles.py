"""Rich consoles that print text literally: no markup or emoji codes, visible escape sequences, unbroken paths."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.control import Control
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from psannlm.display import printable
from psannlm.runtime.streams import is_terminal

# A table needs the minimum width for its values. The width for files is a default: their reader is unknown.
_MIN_WIDTH, _FILE_WIDTH, _MAX_WIDTH, _FILE_HEIGHT = 40, 80, 1000, 25


def make_console(*, stderr: bool = False, file: TextIO | None = None, width: int | None = None) -> Console:
    """Return a console on standard output, standard error or ``file``.

    Only a terminal gets live output and styles, whatever the environment variables. (``FORCE_COLOR`` colours the
    standard output of a command.) Lines are wrapped on terminals only.
    """
    stream = file or (sys.stderr if stderr else sys.stdout)
    is_live = is_terminal(stream)
    has_colour = not is_live and not stderr and file is None and os.environ.get("FORCE_COLOR", "") not in ("", "0")
    width, height = (width, _FILE_HEIGHT) if width else _size(stream, is_live)
    console = Console(
        file=file,
        stderr=stderr,
        width=width,
        height=height,
        force_terminal=None if is_live else False,
        force_interactive=None if is_live else False,
        color_system="standard" if has_colour else "auto",
        soft_wrap=not is_live,
        markup=False,
        emoji=False,
        highlight=False,
    )
    console.push_render_hook(_Escaping())
    return console


def print_line(console: Console, text: object) -> None:
    """Print a text literally, with visible escapes and unwrapped; above a live display of this console, if any."""
    console.print(Text(printable(text, keep="\n")), soft_wrap=True)


def _size(stream: Any, is_live: bool) -> tuple[int | None, int | None]:
    """Return the width of COLUMNS, within bounds, and a height; None where rich detects it."""
    columns = _asked_columns()
    if not is_live:
        return min(max(columns, _FILE_WIDTH), _MAX_WIDTH), _FILE_HEIGHT
    if columns:
        return max(columns, _MIN_WIDTH), None
    try:
        found = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError, AttributeError):
        found = os.terminal_size((0, 0))
    if found.columns >= _MIN_WIDTH and not os.environ.get("COLUMNS"):
        return None, None
    # A terminal of unknown size reports 0.
    return max(found.columns or _FILE_WIDTH, _MIN_WIDTH), found.lines or _FILE_HEIGHT


def _asked_columns() -> int:
    """Return the width of COLUMNS; 0 if it is not a number of at most five digits."""
    asked = os.environ.get("COLUMNS", "")
    return int(asked) if asked.isascii() and asked.isdigit() and len(asked) < 6 else 0


class _Escaping(RenderHook):
    """Render hook that makes escape sequences in printed text visible, except those of rich itself."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Wrap each renderable."""
        return [shown if isinstance(shown, Control) else _Escaped(shown) for shown in renderables]


class _Escaped:
    def __init__(self, inner: ConsoleRenderable) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Segment]:
        for segment in console.render(self._inner, options):
            yield segment if segment.control else Segment(printable(segment.text, keep="\n"), segment.style)


class FiguresTable(Table):
    """Table of names and values, as wide as its values if the output is not a terminal.

    A ``COLUMNS`` of 80 or more limits the width, but never breaks the path of an existing file or folder.
    """

    def __init__(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        super().__init__(title=printable(title), title_justify="left", show_header=False, title_style="bold")
        self.add_column(style="cyan", no_wrap=True)
        self.add_column(overflow="fold")
        self._widest_path = 0
        for name, value in rows:
            if os.path.lexists(value):
                self._widest_path = max(self._widest_path, cell_len(printable(value)))
            self.add_row(Text(printable(name)), Text(printable(value, keep="\n")))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not console.is_terminal:
            options = options.update(width=max(options.max_width, self._natural_width(console, options)))
        yield from super().__rich_console__(console, options)

    def _natural_width(self, console: Console, options: ConsoleOptions) -> int:
        if _asked_columns() >= _FILE_WIDTH:
            names = max(cell_len(str(cell)) for cell in self.columns[0].cells) if self.row_count else 0
            return names + self._widest_path + _BORDERS
        return Measurement.get(console, options.update(width=_UNBOUNDED), self).maximum


_UNBOUNDED = 1 << 20
# Three vertical lines, and a blank on each side of two cells.
_BORDERS = 7

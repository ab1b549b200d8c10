"""Matplotlib figures to image bytes, whatever the user's Matplotlib settings are, and without changing them.

Every picture of the package is drawn here: with Matplotlib's own defaults, on an Agg canvas through the object API. A
``matplotlibrc``, ``MPLBACKEND`` or pyplot state of the user neither decides how a picture looks nor is touched by it.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from psannlm.display import printable
from psannlm.errors import PictureError, is_out_of_memory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# rc_context restores everything but the backend, so that is the one thing that must not be set.
_KEPT = ("backend", "backend_fallback", "interactive")
# Names of runs and folders stand in titles and legends: "$" starts no formula in them.
_OURS = {"text.parse_math": False}


def render_figure(
    draw: Callable[[], Figure],
    *,
    form: str = "png",
    dpi: int = 150,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> bytes:
    """Return the figure that ``draw`` makes as ``form``, PNG or SVG.

    Args:
        draw: makes and fills a ``matplotlib.figure.Figure``; called with the default style in force.
        dpi: resolution in pixels per inch.
        settings: rcParams on top of Matplotlib's defaults.
        options: passed to ``Figure.savefig``.

    Raises:
        PictureError: Matplotlib is missing or broken, or cannot draw this figure; the message has its reason.
    """
    (content,) = render_formats(draw, {form: options}, dpi=dpi, settings=settings)
    return content


def render_formats(
    draw: Callable[[], Figure],
    formats: Mapping[str, Mapping[str, Any]],
    *,
    dpi: int = 150,
    settings: Mapping[str, Any] | None = None,
) -> list[bytes]:
    """Return one figure in several formats; it is built, and its layout solved, once.

    Args:
        formats: for each format, PNG or SVG, the options of ``Figure.savefig``.
        draw, dpi, settings: as in :func:`render_figure`.

    Raises:
        PictureError: as :func:`render_figure`.
    """
    contents = []
    try:
        with _quiet(), _default_style(settings or {}):
            from matplotlib.backends.backend_agg import FigureCanvasAgg

            figure = draw()
            _show_escapes(figure)
            FigureCanvasAgg(figure)
            for form, options in formats.items():
                page = io.BytesIO()
                figure.savefig(page, format=form, dpi=dpi, **options)
                contents.append(page.getvalue())
                # The first drawing has placed everything; solving the layout takes a third of the time of a drawing.
                figure.set_layout_engine("none")
    except Exception as error:
        # Matplotlib documents no common base for its errors: a bad value may end in any of them, deep within.
        reason = (
            "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {' '.join(str(error).split())}"
        )
        raise PictureError(f"Matplotlib could not draw it: {reason[:300]}") from error
    return contents


def _show_escapes(figure: Figure) -> None:
    """Show the unseen characters of titles and labels, which hold names of others, as escapes."""
    from matplotlib.text import Text
    from matplotlib.ticker import FuncFormatter

    for text in figure.findobj(Text):
        if isinstance(text, Text):
            text.set_text(printable(text.get_text(), keep="\n"))
    # Labels of ticks are made as the figure is drawn; Matplotlib keeps those that are names in a function.
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        formatter = axis.get_major_formatter()
        if isinstance(formatter, FuncFormatter):
            formatter.func = _escaped_labels(formatter.func)


def _escaped_labels(label: Callable[..., str]) -> Callable[..., str]:
    return lambda *position: printable(label(*position), keep="\n")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Matplotlib's warnings, such as those of missing glyphs or of an unwritable cache, from the user."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _default_style(settings: Mapping[str, Any]) -> Iterator[None]:
    """Put Matplotlib's default rcParams and ``settings`` in force, and afterwards the user's again."""
    matplotlib = _import_matplotlib()
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key not in _KEPT}
    with matplotlib.rc_context({**defaults, **_OURS, **settings}):
        yield


def _import_matplotlib() -> Any:
    """Import Matplotlib; where the user's backend or matplotlibrc stops the import, without them."""
    try:
        import matplotlib
    except (ValueError, OSError):  # a backend that is not installed here; a file that cannot be read or decoded
        # Submodules that were imported before the failure would not be bound to the package again.
        for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
            del sys.modules[name]
        with _environment({"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}):
            import matplotlib
    return matplotlib


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

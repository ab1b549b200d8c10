"""Rendering of Matplotlib figures to bytes, independent of the user's Matplotlib settings.

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

# rc_context restores everything except the backend, which therefore must not be set.
_KEPT = ("backend", "backend_fallback", "interactive")
# The resolution of SVG.
_POINTS_PER_INCH = 72
# Names of runs and folders appear in titles and legends, where "$" must not start a formula.
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
            _solve_layout(figure, _POINTS_PER_INCH if next(iter(formats)) == "svg" else dpi)
            for form, options in formats.items():
                page = io.BytesIO()
                figure.savefig(page, format=form, dpi=dpi, **options)
                contents.append(page.getvalue())
    except Exception as error:
        # Matplotlib documents no common base class of its errors: a bad value may raise any of them.
        reason = (
            "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {' '.join(str(error).split())}"
        )
        raise PictureError(f"Matplotlib could not draw it: {reason[:300]}") from error
    return contents


def _solve_layout(figure: Figure, dpi: float) -> None:
    """Place the axes of a figure for good; left to Matplotlib, that takes one drawing more for each format."""
    engine = figure.get_layout_engine()
    if engine is not None:
        figure.set_dpi(dpi)
        engine.execute(figure)
        figure.set_layout_engine(None)


def _show_escapes(figure: Figure) -> None:
    """Escape invisible characters in titles and labels, which contain names chosen by users."""
    from matplotlib.text import Text
    from matplotlib.ticker import FuncFormatter

    for text in figure.findobj(Text):
        if isinstance(text, Text):
            text.set_text(printable(text.get_text(), keep="\n"))
    # Tick labels are created while drawing; Matplotlib stores fixed ones in a formatter function.
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        formatter = axis.get_major_formatter()
        if isinstance(formatter, FuncFormatter):
            formatter.func = _escaped_labels(formatter.func)


def _escaped_labels(label: Callable[..., str]) -> Callable[..., str]:
    return lambda *position: printable(label(*position), keep="\n")


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Matplotlib's warnings, such as those about missing glyphs or an unwritable cache."""
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
    """Use Matplotlib's default rcParams and ``settings``, and restore the user's afterwards."""
    matplotlib = _import_matplotlib()
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key not in _KEPT}
    with matplotlib.rc_context({**defaults, **_OURS, **settings}):
        yield


def _import_matplotlib() -> Any:
    """Import Matplotlib, ignoring the user's backend or matplotlibrc if they make the import fail."""
    try:
        import matplotlib
    except (ValueError, OSError):  # a backend that is not installed here; a file that cannot be read or decoded
        # Otherwise submodules imported before the failure would not be attributes of the package.
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

"""Plots of curves, bars and intervals: SVG for light and dark pages, wide and narrow, and PNG for files.

Colours are Okabe and Ito's, which colour-blind readers can distinguish (https://jfly.uni-koeln.de/color/); line
styles and markers distinguish the curves in print as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from psannlm.display import printable
from psannlm.io.figures import render_formats
from psannlm.reports.page_model import Picture, format_float

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of curves and bars, of text, and of axes and grid: each as it is on a light page, and as it is on a dark one.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
_DARK_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#f0e442", "#d0d0d0")
_INK = ("#22272b", "#dfe3e6")
_RULE = ("#c9ced2", "#454c52")
# How Matplotlib writes colours in SVG: "fill: #0072b2", in lower case.
_SVG_COLOUR = re.compile(rb"((?:fill|stroke): )(#[0-9a-f]{6})\b")
_DARK_COLOUR = {
    light.encode(): dark.encode() for light, dark in (*zip(_COLOURS, _DARK_COLOURS, strict=True), _INK, _RULE)
}
_MARKERS = "osD^vPX"
_STYLES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
# Inches at which text of the sizes below reads well in a column of 720, and on a phone of 390 pixels.
_WIDE, _NARROW = (7.2, 3.9), (3.7, 3.5)
# Legend: text size in points, width of a line's mark and padding in multiples of it, height of a line in inches, and
# the number of lines (wide, narrow) that fit into the heights above.
_TEXT, _MARK, _LINE_HEIGHT, _LEGEND_LINES = 9.5, 5.6, 0.21, {False: 2, True: 4}
_MOST_POINTS = 400
# So few values of a logarithmic axis are its ticks themselves.
_MOST_TICKS = 8
# Larger than any measured figure; comparing with it excludes NaN too.
_LARGEST_DRAWN = 1e15
_FONT = "DejaVu Sans"
_LONGEST_LABEL = {False: 44, True: 26}


@dataclass(frozen=True)
class Curve:
    """Points of one line. ``is_faint`` draws it thin, without markers and out of the legend, in its group's colour.

    Curves of one ``group`` share a colour; groups are coloured in the order in which they come first.
    """

    group: str
    x: Sequence[float]
    y: Sequence[float]
    is_faint: bool = False


@dataclass(frozen=True)
class Bar:
    """A value with its lowest and highest measurement (both None when measured once)."""

    name: str
    value: float
    lowest: float | None = None
    highest: float | None = None


def draw_curves(
    file: str,
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    caption: str,
    *,
    is_log_x: bool = False,
    has_perplexity: bool = False,
) -> Picture:
    """Draw curves on one pair of axes; labels carry the units.

    With ``has_perplexity``, y is a loss in nats per token, and an axis on the right shows its exponential.
    """
    curves = [Curve(printable(c.group), *_drawable(c.x, c.y), is_faint=c.is_faint) for c in curves]
    groups = list(dict.fromkeys(curve.group for curve in curves))

    def draw(axes: Axes, look: _Look) -> None:
        for curve in curves:
            at = groups.index(curve.group)
            x, y = _thinned(curve.x, curve.y)
            colour, style = _COLOURS[at % len(_COLOURS)], _STYLES[at // len(_MARKERS) % len(_STYLES)]
            if curve.is_faint:
                # A line through one point is not seen.
                marker = "." if len(x) == 1 else None
                axes.plot(x, y, color=colour, linewidth=0.9, alpha=0.45, linestyle=style, marker=marker, zorder=1)
                continue
            axes.plot(
                x,
                y,
                color=colour,
                linewidth=1.7,
                linestyle=style,
                marker=_MARKERS[at % len(_MARKERS)],
                markersize=4.5,
                markevery=max(1, len(x) // 12),
                label="curve",
                zorder=2,
            )
        if is_log_x:
            axes.set_xscale("log")
            values = sorted({x for curve in curves for x in curve.x})
            if len(values) <= _MOST_TICKS:
                axes.set_xticks(values)
                axes.minorticks_off()
        axes.xaxis.set_major_formatter(_thousands())
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _scale_to_the_end(axes, curves)
        if has_perplexity and curves:
            _add_perplexity_axis(axes)
        look.legend(axes, names)

    names = list(dict.fromkeys(curve.group for curve in curves if not curve.is_faint))
    alternative = f"{y_label} against {x_label}: {', '.join(groups[:12])}"
    return _picture(file, alternative, caption, draw, names=names)


def draw_bars(file: str, bars: Sequence[Bar], label: str, caption: str, *, zero_line: bool = False) -> Picture:
    """Draw horizontal bars from zero with their edges; with ``zero_line`` points with intervals around zero instead."""
    bars = [replace(bar, name=printable(bar.name)) for bar in bars if abs(bar.value) <= _LARGEST_DRAWN]

    def draw(axes: Axes, look: _Look) -> None:
        for at, bar in enumerate(bars):
            colour = _COLOURS[0]
            edges = None
            if bar.lowest is not None and bar.highest is not None:
                edges = [[max(0.0, bar.value - bar.lowest)], [max(0.0, bar.highest - bar.value)]]
            whiskers: dict[str, Any] = {"ecolor": _INK[0], "capsize": 3, "elinewidth": 1.1}
            if zero_line:
                axes.errorbar(bar.value, at, xerr=edges, fmt="o", color=colour, markersize=6, **whiskers)
            else:
                axes.barh(at, bar.value, height=0.62, color=colour, alpha=0.85)
                if edges is not None:
                    axes.errorbar(bar.value, at, xerr=edges, fmt="none", **whiskers)
        axes.set_yticks(range(len(bars)), [look.short(bar.name) for bar in bars])
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(_thousands())
        axes.set_xlabel(label)
        axes.grid(visible=False, axis="y")
        if zero_line:
            axes.axvline(0.0, color=_INK[0], linewidth=1)
            axes.margins(y=0.15)

    values = "; ".join(f"{bar.name} {format_float(float(bar.value))}" for bar in bars[:12])
    return _picture(file, f"{label}: {values}", caption, draw, n_rows=len(bars))


@dataclass(frozen=True)
class _Look:
    """Width of a picture: for a desktop, or narrow for a phone."""

    is_narrow: bool

    def columns(self, names: Sequence[str]) -> int:
        """Return the number of columns of a legend: as many as fit, and no more than fill their lines."""
        from matplotlib.font_manager import findfont, get_font

        font = get_font(findfont(_FONT))
        font.set_size(_TEXT, 72)
        widths = []
        for name in names:
            font.set_text(self.short(name), 0.0)
            widths.append(font.get_width_height()[0] / 64)
        across = 72 * (_NARROW if self.is_narrow else _WIDE)[0]
        most = max(1, int(across // (max(widths, default=0.0) + _MARK * _TEXT)))
        lines = -(-len(names) // most)
        return -(-len(names) // lines) if lines else 1

    def short(self, name: str) -> str:
        """Cut a name to the longest label that fits."""
        longest = _LONGEST_LABEL[self.is_narrow]
        return name if len(name) <= longest else f"{name[: longest - 1]}…"

    def height(self, names: Sequence[str]) -> float:
        """Return the height in inches of a picture with a legend, which does not shrink the axes."""
        lines = -(-len(names) // self.columns(names))
        return (_NARROW if self.is_narrow else _WIDE)[1] + _LINE_HEIGHT * max(0, lines - _LEGEND_LINES[self.is_narrow])

    def legend(self, axes: Axes, names: Sequence[str]) -> None:
        """Put the names below the axes, where they hide no curve."""
        if not names:
            return
        columns = self.columns(names)
        lines = axes.get_legend_handles_labels()[0]
        # Matplotlib leaves out labels that begin with an underscore, which a run's name may: the lines are labelled by
        # their number, and the names are put in afterwards.
        labels = [str(at) for at in range(len(lines))]
        legend = axes.figure.legend(
            lines, labels, loc="outside lower left", ncols=columns, frameon=False, handlelength=2.6
        )
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set_text(self.short(name))
            text.set_color(_INK[0])


def _picture(
    file: str,
    alternative: str,
    caption: str,
    draw: Callable[[Axes, _Look], None],
    *,
    n_rows: int = 0,
    names: Sequence[str] = (),
) -> Picture:
    wide, png = _render(draw, _Look(is_narrow=False), ("svg", "png"), n_rows, names)
    (narrow,) = _render(draw, _Look(is_narrow=True), ("svg",), n_rows, names)
    forms = {
        (is_narrow, is_dark): _darkened(svg) if is_dark else svg
        for is_narrow, svg in ((False, wide), (True, narrow))
        for is_dark in (False, True)
    }
    return Picture(file, alternative, caption, png, forms)


def _render(
    draw: Callable[[Axes, _Look], None], look: _Look, formats: Sequence[str], n_rows: int, names: Sequence[str]
) -> list[bytes]:
    settings: Any = {
        "font.family": _FONT,
        "font.size": _TEXT,
        "axes.facecolor": "none",
        "axes.edgecolor": _RULE[0],
        "axes.labelcolor": _INK[0],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _RULE[0],
        "grid.alpha": 0.5,
        "grid.linewidth": 0.6,
        "text.color": _INK[0],
        "xtick.color": _INK[0],
        "ytick.color": _INK[0],
        "svg.hashsalt": "psannlm",
    }

    def fill() -> Figure:
        from matplotlib.figure import Figure

        width = (_NARROW if look.is_narrow else _WIDE)[0]
        height = 1.0 + 0.36 * n_rows if n_rows else look.height(names)
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots(), look)
        return figure

    options: dict[str, dict[str, Any]] = {
        "svg": {"facecolor": "none", "metadata": {"Date": None, "Creator": None}},
        "png": {"facecolor": "white", "metadata": {"Software": None}},
    }
    return render_formats(fill, {form: options[form] for form in formats}, settings=settings)


def _darkened(svg: bytes) -> bytes:
    """Return a drawing for a light page in the colours for a dark one, which saves drawing it a second time."""
    return _SVG_COLOUR.sub(lambda match: match[1] + _DARK_COLOUR.get(match[2], match[2]), svg)


def _drawable(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Leave out non-finite and absurdly large points, which would press the others together."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if abs(a) <= _LARGEST_DRAWN and abs(b) <= _LARGEST_DRAWN]
    return [a for a, _ in points], [b for _, b in points]


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Keep at most ``_MOST_POINTS`` evenly spaced points, the last one included."""
    step = max(1, -(-len(x) // _MOST_POINTS))
    kept = sorted({*range(0, len(x), step), *([len(x) - 1] if x else [])})
    return [x[at] for at in kept], [y[at] for at in kept]


def _add_perplexity_axis(axes: Axes) -> None:
    """Add an axis on the right: the ticks of the loss axis are linear, so those of perplexity are powers and halves."""
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = axes.get_ylim()
    beside = axes.secondary_yaxis("right", functions=(_exponential, _logarithm))
    decades = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
    digits = (1, 2, 5) if high - low > 1.2 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    ticks = [digit * 10.0**power for power in decades for digit in digits]
    shown = [tick for tick in ticks if low <= math.log(tick) <= high]
    if len(shown) < 2:
        shown = [math.exp(low + fraction * (high - low)) for fraction in (0.1, 0.5, 0.9)]
    beside.yaxis.set_major_locator(FixedLocator(shown))
    beside.yaxis.set_minor_locator(NullLocator())
    beside.yaxis.set_major_formatter(_thousands())
    beside.set_ylabel("perplexity")


def _exponential(loss: Any) -> Any:
    # Matplotlib tries values far outside the axes as well.
    return np.exp(np.clip(loss, -700.0, 700.0))


def _logarithm(perplexity: Any) -> Any:
    return np.log(np.clip(perplexity, 1e-300, None))


def _scale_to_the_end(axes: Axes, curves: Sequence[Curve]) -> None:
    """Scale the y axis to the later part of the curves: a start at ln(vocabulary) would press them together."""
    lows = [min(curve.y) for curve in curves if len(curve.y)]
    starts = [curve.y[len(curve.y) // 8] for curve in curves if len(curve.y) >= 8]
    if not lows or not starts:
        return
    low, high = min(lows), max(*starts, *(max(c.y[len(c.y) // 8 :]) for c in curves if len(c.y) >= 8), max(lows))
    short = [max(curve.y) for curve in curves if 0 < len(curve.y) < 8 and not curve.is_faint]
    high = max([high, *short])
    margin = 0.05 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)


def _thousands() -> Any:
    """Tick labels such as 60k and 1.5M, with a true minus."""
    from matplotlib.ticker import FuncFormatter

    def label(value: float, position: int | None = None) -> str:
        for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:g}{letter}".replace("-", "−")
        return f"{value:.6g}".replace("-", "−")

    return FuncFormatter(label)

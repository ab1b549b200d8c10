"""Figures are independent of the user's Matplotlib settings and restore them."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import pytest

from psannlm.errors import PictureError
from psannlm.io.figures import render_figure, render_formats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Draws a curve in a fresh process, prints what the user's settings are afterwards, and compares the pixels.
_DRAW = """
import sys
from psannlm.io.figures import render_figure, render_formats

def draw():
    from matplotlib.figure import Figure
    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([1, 2], [3, 4])
    figure.suptitle("a$b_{$ \\u4e2d")
    return figure

sys.stdout.buffer.write(render_figure(draw))
"""


def draw_elsewhere(folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    root = str(Path(__file__).parents[2])
    settings = {**os.environ, "PYTHONPATH": root, **environment}
    return subprocess.run([sys.executable, "-c", _DRAW], capture_output=True, cwd=folder, env=settings)


def plain() -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([1, 2], [3, 4])
    figure.suptitle("a$b_{$ \u4e2d")
    return figure


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "settings"),
    [
        ({"MPLBACKEND": "module://matplotlib_inline.backend_inline"}, b""),
        ({"MPLBACKEND": "no such backend"}, b""),
        ({"MPLBACKEND": "qtagg"}, b""),
        ({}, b"text.usetex: True\nfigure.facecolor: red\nlines.linewidth: 9\nsavefig.dpi: 10\n"),
        ({}, b"no.such.key: 1\nlines.linewidth: wide\n:::\n"),
        ({"MATPLOTLIBRC": "undecodable"}, b""),
        ({"MPLCONFIGDIR": "/proc/none"}, b""),
    ],
    ids=["inline", "unknown", "gui", "usetex", "broken", "undecodable", "unwritable"],
)
def test_settings_of_the_user_change_no_picture(environment: dict[str, str], settings: bytes, tmp_path: Path) -> None:
    (tmp_path / "undecodable").write_bytes(b"font.family: \xff\xfe\n")
    if settings:
        (tmp_path / "matplotlibrc").write_bytes(settings)
    done = draw_elsewhere(tmp_path, **environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == render_figure(plain)


def test_drawing_restores_the_settings_of_the_caller() -> None:
    before = dict(mpl.rcParams.copy())
    with mpl.rc_context({"lines.linewidth": 7.0}):
        render_figure(plain, settings={"font.size": 3.0})
        assert mpl.rcParams["lines.linewidth"] == 7.0
    assert dict(mpl.rcParams.copy()) == before


def test_matplotlib_warnings_do_not_reach_the_user(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert render_figure(plain).startswith(b"\x89PNG\r\n\x1a\n")
    assert caplog.records == []


def test_a_figure_that_fails_is_a_picture_error() -> None:
    def draw() -> Figure:
        figure = plain()
        figure.axes[0].set_xlim(float("nan"), 1.0)
        return figure

    with pytest.raises(PictureError, match="ValueError: Axis limits cannot be NaN or Inf"):
        render_figure(draw)


def test_names_in_a_picture_are_shown_with_their_escapes() -> None:
    """A byte that is not UTF-8 would end the drawing, and a control character show nothing."""
    from matplotlib.figure import Figure

    hostile = "caf\udce9\x1b $x$"
    drawn: list[Figure] = []

    def draw() -> Figure:
        figure = Figure(figsize=(2, 2))
        axes = figure.subplots()
        axes.plot([0, 1], label=hostile)
        axes.set_title(hostile)
        axes.set_yticks([0, 1], [hostile, "b"])
        axes.legend()
        drawn.append(figure)
        return figure

    assert render_figure(draw).startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    texts = [axes.get_title(), axes.get_yticklabels()[0].get_text(), axes.get_legend().get_texts()[0].get_text()]
    assert texts == ["caf\\xe9\\x1b $x$"] * 3


def test_picture_is_drawn_once_per_format(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    draw_figure, n_drawn, figure = Figure.draw, 0, Figure(layout="constrained")

    def counted(*args: Any) -> None:
        nonlocal n_drawn
        n_drawn += 1
        draw_figure(*args)

    def draw() -> Figure:
        figure.subplots().set_ylabel("a label")
        return figure

    monkeypatch.setattr(Figure, "draw", counted)
    render_formats(draw, {"svg": {}, "png": {}})
    assert n_drawn == 2
    label = figure.axes[0].yaxis.label.get_window_extent()
    assert 0 < label.x0 < label.x1 < figure.axes[0].get_window_extent().x0, "the layout has made space for the label"

"""Plots: readable on light and dark pages and without colours."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from psannlm.reports.plots import Curve, draw_curves


def test_plots_are_transparent_and_markers_distinguish_curves() -> None:
    curves = [Curve(name, [1, 2, 3], [3.0, 2.0, level]) for name, level in (("a", 1.0), ("$b$", 1.5))]
    picture = draw_curves("x.png", curves, "tokens seen", "loss (nats per token)", "")
    assert set(picture.forms) == {(narrow, dark) for narrow in (False, True) for dark in (False, True)}
    for (_, is_dark), content in picture.forms.items():
        drawing = content.decode()
        assert not re.search(r"fill: (?:#f{3,6}|white)", drawing)
        assert ("#dfe3e6" in drawing) == is_dark
    shapes = re.findall(
        r'<path id="(m[0-9a-f]+)" d="([^"]+)"[^>]*style="stroke: #(?:0072b2|d55e00)',
        picture.forms[False, False].decode(),
    )
    assert len({path for _, path in shapes}) == 2, "each curve has a marker of its own"


@pytest.mark.parametrize("n_curves", [1, 3, 14, 31])
@pytest.mark.parametrize("length", [4, 17, 44])
def test_plot_legend_of_many_names_leaves_axes_readable(
    n_curves: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, page, **settings: drawn.append(figure))
    curves = [Curve(f"{at:0{length}d}", [0.0, 1.0], [2.0, 1.0 + at / 50]) for at in range(n_curves)]
    draw_curves("x.png", curves, "tokens seen", "loss (nats per token)", "")

    assert len({figure.get_figwidth() for figure in drawn}) == 2  # wide and narrow
    for figure in drawn:
        figure.draw_without_rendering()
        axes, (legend,) = figure.axes[0], figure.legends
        assert axes.get_position().height * figure.get_figheight() > 2.0  # inches
        names = legend.get_texts()
        assert len(names) == n_curves
        boxes = [text.get_window_extent() for text in names]
        sheet, words = figure.bbox, axes.yaxis.label.get_window_extent()
        assert all(sheet.x0 <= box.x0 and box.x1 <= sheet.x1 and sheet.y0 <= box.y0 for box in boxes)
        assert words.y0 >= sheet.y0
        assert words.y1 <= sheet.y1


@pytest.mark.slow
def test_plot_styles_distinguish_35_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[tuple[object, ...]] = []
    plot = Axes.plot

    def note(axes: Axes, *points: Any, **look: Any) -> Any:
        looks.append((look["color"], look["marker"], look["linestyle"]))
        return plot(axes, *points, **look)

    monkeypatch.setattr(Axes, "plot", note)
    draw_curves("x.png", [Curve(str(at), [0.0, 1.0], [2.0, 1.0]) for at in range(35)], "x", "y", "")
    assert len(looks) == 35 * 2  # wide and narrow; dark pages and the PNG file take the same drawings
    assert len(set(looks[:35])) == 35


def test_loss_plot_has_a_perplexity_axis() -> None:
    curves = [Curve("a run", [0.0, 1.0, 2.0], [math.log(200.0), math.log(60.0), math.log(15.0)])]
    for has_perplexity in (True, False):
        picture = draw_curves("x.png", curves, "tokens seen", "loss", "", has_perplexity=has_perplexity)
        labels = re.findall(r"<!-- (\S+) -->", str(picture.forms[False, False], "utf-8"))
        assert ("perplexity" in labels) is has_perplexity
        # Tick labels of the axis on the right; the loss itself lies between 2.7 and 5.3.
        assert ({"20", "50", "100"} <= set(labels)) is has_perplexity


def test_plot_legend_includes_names_with_leading_underscore(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, page, **settings: drawn.append(figure))
    names = ["_base", "plain", "__", "a$b$"]
    draw_curves("x.png", [Curve(name, [0.0, 1.0], [2.0, 1.0]) for name in names], "x", "y", "")
    for figure in drawn:
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == names

"""Plots of the GPU validation suite: throughput, and training losses in three precisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psannlm.io.atomic import write_bytes
from psannlm.io.figures import render_figure
from psannlm.reports.schemas.gpu import CheckResult, SuiteReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Palette of Okabe and Ito (2008), distinguishable for the colour-blind; markers distinguish curves without colour.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("-", "--", ":")


def draw_suite(folder: Path, report: SuiteReport) -> list[Path]:
    """Plot the curves of all checks that have any into ``folder``, and return the files.

    Raises:
        PictureError: a picture cannot be drawn.
        StorageError: a picture cannot be written.
    """
    drawn = []
    for result in report.checks:
        if result.check == "GPU-02" and result.series:
            drawn.append(_write(folder / "precision.png", partial(_losses_figure, result)))
        if result.check == "GPU-03" and len(result.series) > 1:
            machine = str(report.machine["name"])
            drawn.append(_write(folder / "throughput.png", partial(_throughput_figure, result, machine)))
    return drawn


def _write(path: Path, draw: Callable[[], Figure]) -> Path:
    write_bytes(path, render_figure(draw))
    return path


def _losses_figure(result: CheckResult) -> Figure:
    """Plot the float32 losses, and below them the distances of the other precisions, which one scale would hide."""
    from matplotlib.ticker import LogFormatter, MaxNLocator

    figure = _figure(height=7.5)
    losses, distances = figure.subplots(2, 1, sharex=True)
    names = sorted({name.rpartition(", ")[0] for name in result.series})
    for place, name in enumerate(names):
        exact = result.series.get(f"{name}, float32", [])
        style: dict[str, Any] = {"color": _COLOURS[place], "marker": _MARKERS[place], "markersize": 4, "linewidth": 1.5}
        losses.plot(range(1, len(exact) + 1), exact, label=f"{name}, float32", **style)
        for dash, dtype in zip(_DASHES[1:], ("bfloat16", "float16"), strict=True):
            pairs = zip(result.series.get(f"{name}, {dtype}", []), exact, strict=False)
            # Zero cannot be drawn on a logarithmic scale.
            gaps = [abs(a - b) or float("nan") for a, b in pairs]
            distances.plot(range(1, len(gaps) + 1), gaps, dash, label=f"{name}, {dtype}", **style)
    losses.set(title="The same training in three precisions", ylabel="loss (nats per token)")
    distances.set(xlabel="optimiser step", ylabel="distance from float32 (nats per token)", yscale="log")
    # The formatter of logarithmic axes that does not need mathtext.
    distances.yaxis.set_major_formatter(LogFormatter())
    distances.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _with_legends(figure, (losses, distances))


def _throughput_figure(result: CheckResult, machine: str) -> Figure:
    figure = _figure(height=5.0)
    axes = figure.subplots()
    tokens = result.series["batch tokens"]
    names = sorted({name.rpartition(": ")[0] for name in result.series if ": " in name})
    for place, name in enumerate(names):
        for dash, kind in zip(_DASHES, ("training", "forward"), strict=False):
            rates = result.series.get(f"{name}: {kind}", [])
            style: Mapping[str, Any] = {"color": _COLOURS[place], "marker": _MARKERS[place], "linewidth": 1.5}
            axes.plot(tokens[: len(rates)], [rate / 1e3 for rate in rates], dash, label=f"{name}, {kind}", **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{count:,.0f}" for count in tokens])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(title=f"Throughput on {machine}", xlabel="batch (tokens)", ylabel="throughput (thousand tokens/s)")
    return _with_legends(figure, (axes,))


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(9, height), layout="constrained")


def _with_legends(figure: Figure, panels: Sequence[Axes]) -> Figure:
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure

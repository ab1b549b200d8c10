"""The figures of a run to ``metrics.jsonl``, one JSON object a line, and to a picture of the loss."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psannlm.io.atomic import explain_write_errors, write_bytes, write_text
from psannlm.io.figures import render_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss_curve.png"
# Okabe and Ito's palette: told apart by the colour-blind.
_TRAIN_COLOUR, _VAL_COLOUR, _BEST_COLOUR = "#56B4E9", "#D55E00", "#009E73"


class MetricsLog:
    """Appends to ``metrics.jsonl``.

    Each row has the ``step`` it belongs to and a ``kind``: ``train``, ``eval``, ``sample`` (a prompt and the text that
    followed) or ``skipped`` (a step that was not finite).
    """

    def __init__(
        self, folder: Path, after_step: int = 0, also: Callable[[str, int, dict[str, Any]], None] | None = None
    ) -> None:
        """Open the log of a run that goes on after ``after_step``; rows of later steps, about to be made again, go.

        Args:
            also: handed each row too, as :meth:`write` gets it.

        Raises:
            StorageError: the file cannot be written.
        """
        self.path = folder / METRICS_FILE
        self._also = also
        kept = [row for row in read_metrics(folder) if row["step"] <= after_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one row and hand it to the operating system. Raises StorageError if the disk is full."""
        # JSON knows no infinity: a gradient norm that overflowed under fp16 is written as null.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with explain_write_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **finite}) + "\n")
        if self._also is not None:
            self._also(kind, step, values)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log, oldest first; a last line that a crash cut short is left out."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def draw_curve(folder: Path, title: str, rows: list[dict[str, Any]]) -> Path:
    """Draw training and validation loss against the step and return the picture's path.

    Raises:
        PictureError: the picture cannot be drawn.
        StorageError: the picture cannot be written.
    """
    path = folder / CURVE_FILE
    write_bytes(path, render_figure(lambda: _curve(title, rows), metadata={"Software": "psannlm"}))
    return path


def _curve(title: str, rows: list[dict[str, Any]]) -> Figure:
    from matplotlib.figure import Figure

    train = [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]
    evals = [(row["step"], row["loss"], row["bits_per_byte"]) for row in rows if row["kind"] == "eval"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if train:
        # A line through one point is not seen.
        marker = "o" if len(train) == 1 else None
        axes.plot(
            *zip(*train, strict=True), color=_TRAIN_COLOUR, linewidth=1.5, marker=marker, label="training (one step)"
        )
    if evals:
        steps, losses, bits = zip(*evals, strict=True)
        axes.plot(steps, losses, color=_VAL_COLOUR, linewidth=2, marker="o", markersize=4, label="validation")
        best = losses.index(min(losses))
        label = f"best: {bits[best]:.3f} bits per byte at step {steps[best]}"
        axes.plot(steps[best], losses[best], "*", color=_BEST_COLOUR, markersize=16, label=label, zorder=3)
    axes.set_title(title)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if train or evals:
        axes.legend(frameon=False)
    return figure

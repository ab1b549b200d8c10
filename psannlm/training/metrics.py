"""Metrics log: ``metrics.jsonl`` with one JSON object per line, TensorBoard event files, and the loss curve."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psannlm.errors import ConfigError, Problem, install_extra
from psannlm.io.atomic import explain_write_errors, write_bytes, write_text
from psannlm.io.figures import render_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss_curve.png"
BOARD_FOLDER = "tensorboard"
# Okabe and Ito's palette, distinguishable by colour-blind readers.
_TRAIN_COLOUR, _VAL_COLOUR, _BEST_COLOUR, _EMA_COLOUR = "#56B4E9", "#D55E00", "#009E73", "#CC79A7"
_TASK_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


class MetricsLog:
    """Append-only log of a run in ``metrics.jsonl``.

    Each row has a ``step`` and a ``kind``: ``train``, ``eval``, ``ema`` (a validation of the averaged weights),
    ``sample`` (a prompt and its continuation), ``tasks`` (scores by task, with ``/stderr`` and ``/chance`` after its
    name) or ``skipped`` (a non-finite step).
    """

    def __init__(
        self, folder: Path, after_step: int = 0, also: Callable[[str, int, dict[str, Any]], None] | None = None
    ) -> None:
        """Open the log of a run that resumes after ``after_step``, and delete the rows of later steps, which are rerun.

        Args:
            also: called with the arguments of every :meth:`write`.

        Raises:
            StorageError: the file cannot be written.
        """
        self.path = folder / METRICS_FILE
        self._also = also
        kept = [row for row in read_metrics(folder) if row["step"] <= after_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one row. Raises StorageError if it cannot be written, such as on a full disk."""
        # JSON has no infinity: a gradient norm that overflowed under fp16 is written as null.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with explain_write_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **finite}) + "\n")
        if self._also is not None:
            self._also(kind, step, values)


def require_tensorboard() -> None:
    """Raise ConfigError with the install command if the package tensorboard is missing."""
    if find_spec("tensorboard") is None:
        message = f"needs the package tensorboard; {install_extra('tensorboard')}, or set it to false"
        raise ConfigError(Problem("train.tensorboard", message))


class TensorBoardLog:
    """TensorBoard event files in ``tensorboard/`` of a run: numbers as scalars ``kind/name``, samples as texts."""

    def __init__(self, folder: Path, after_step: int = 0) -> None:
        """Open the log of a run that resumes after ``after_step``; events of later steps are purged.

        Raises:
            StorageError: the files cannot be written.
        """
        # The import adds a handler to a root logger without one, which would print messages of other libraries.
        had_handlers = list(logging.getLogger().handlers)
        from torch.utils.tensorboard import SummaryWriter

        logging.getLogger().handlers[:] = had_handlers
        path = folder / BOARD_FOLDER
        with explain_write_errors(path):
            # TensorBoard discards events of this step and later ones: these steps are rerun.
            self._writer = SummaryWriter(path, purge_step=after_step + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write one row and flush it."""
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"{kind}/{name}", value, step)
        if kind == "sample":
            text = f"{values['prompt']}{values['text']}"
            # Markdown shows an indented text verbatim.
            page = "".join(f"    {line}\n" for line in text.splitlines())
            self._writer.add_text(f"sample/{values['prompt'][:40]}", page, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        self._writer.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log, oldest first, without lines that a crash truncated."""
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
    """Plot training and validation loss, and task scores, against the step; return the path of the image.

    Raises:
        PictureError: the plot cannot be drawn.
        StorageError: the image cannot be written.
    """
    path = folder / CURVE_FILE
    write_bytes(path, render_figure(lambda: _curve(title, rows), metadata={"Software": "psannlm"}))
    return path


def _curve(title: str, rows: list[dict[str, Any]]) -> Figure:
    from matplotlib.figure import Figure

    train = [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]
    evals = [(row["step"], row["loss"], row["bits_per_byte"]) for row in rows if row["kind"] == "eval"]
    averaged = [(row["step"], row["loss"]) for row in rows if row["kind"] == "ema"]
    scored = [row for row in rows if row["kind"] == "tasks"]
    figure = Figure(figsize=(8, 7.5 if scored else 4.5), layout="constrained")
    axes, *below = figure.subplots(2 if scored else 1, sharex=True, squeeze=False)[:, 0]
    for panel in below:
        _plot_tasks(panel, scored)
    if train:
        # A line through one point is invisible.
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
    if averaged:
        axes.plot(
            *zip(*averaged, strict=True),
            color=_EMA_COLOUR,
            marker="s",
            markersize=4,
            label="validation, averaged weights",
        )
    axes.set_title(title)
    (below[-1] if below else axes).set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if train or evals:
        axes.legend(frameon=False)
    return figure


def _plot_tasks(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Plot the score of each task with its standard error, and its chance level as a dashed line."""
    names = list(dict.fromkeys(key for row in rows for key in row if key not in ("kind", "step") and "/" not in key))
    for number, name in enumerate(names):
        points = [(row["step"], row[name], row.get(f"{name}/stderr") or 0.0) for row in rows if name in row]
        colour = _TASK_COLOURS[number % len(_TASK_COLOURS)]
        steps, values, errors = zip(*points, strict=True)
        axes.errorbar(steps, values, errors, color=colour, linewidth=1.5, marker="o", markersize=4, label=name)
        chance = rows[-1].get(f"{name}/chance")
        if chance is not None:
            axes.axhline(chance, color=colour, linewidth=1, linestyle="--")
    axes.set_ylabel("task score (dashed: chance)")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)

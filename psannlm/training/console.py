"""Training progress on a console: a live dashboard on a terminal, one line per log interval elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from psannlm.runtime.consoles import print_line
from psannlm.runtime.device import MemoryUse, memory_in_use
from psannlm.training.callbacks import Callback, StepEvent, ValidationEvent

_BLOCKS = "▁▂▃▄▅▆▇█"
# At this length of the loss curve, each pair of points is merged into one. Even.
_MAX_POINTS = 18


@dataclass
class Dashboard:
    """Values and layout of the three dashboard lines: progress, loss, throughput and memory.

    Losses are in nats per token, times in seconds; ``validation`` is (step, loss) of the last validation.
    """

    total_steps: int
    step: int = 0
    loss: float | None = None
    lr: float = 0.0
    tokens_per_s: float = 0.0
    elapsed_s: float = 0.0
    left_s: float | None = None
    memory: MemoryUse | None = None
    validation: tuple[int, float] | None = None
    is_best: bool = False
    skipped: int = 0
    losses: list[float] = field(default_factory=list)
    _per_point: int = 1
    _pending: list[float] = field(default_factory=list)

    def add_loss(self, loss: float) -> None:
        """Add the loss of one step. A point of the curve is the mean of 1, 2, 4, ... steps, so that it stays short."""
        self.loss = loss
        self._pending.append(loss)
        if len(self._pending) < self._per_point:
            return
        self.losses.append(sum(self._pending) / len(self._pending))
        self._pending.clear()
        if len(self.losses) == _MAX_POINTS:
            self._per_point *= 2
            self.losses = [(a + b) / 2 for a, b in zip(self.losses[::2], self.losses[1::2], strict=True)]

    def render(self) -> RenderableType:
        """Return the lines, as wide as the terminal."""
        progress = Table.grid(padding=(0, 2), expand=True)
        progress.add_column(no_wrap=True)
        progress.add_column(ratio=1)
        progress.add_column(no_wrap=True)
        left = "" if self.left_s is None else f"   {_time(self.left_s)} left"
        progress.add_row(
            Text(f"step {self.step:,} of {self.total_steps:,}", style="bold"),
            ProgressBar(total=max(1, self.total_steps), completed=self.step),
            Text(f"{_time(self.elapsed_s)} elapsed{left}"),
        )
        return Group(progress, self._loss_line(), self._throughput_line())

    def _loss_line(self) -> Text:
        if self.loss is None:
            return _line(["waiting for the first step"])
        curve = sparkline(self.losses)
        parts = [f"loss {self.loss:.4f}{'  ' if curve else ''}{curve}"]
        if self.validation is not None:
            step, loss = self.validation
            parts.append(f"validation {loss:.4f} at step {step:,}{', best so far' if self.is_best else ''}")
        return _line(parts)

    def _throughput_line(self) -> Text:
        parts = []
        if self.loss is not None:
            parts = [f"{self.tokens_per_s:,.0f} tokens/s", f"lr {self.lr:.2e}"]
        if self.skipped:
            parts.append(f"{self.skipped:,} skipped")
        if self.memory is not None:
            parts.append(f"{self.memory.kind} {_size(self.memory.now_bytes)}, peak {_size(self.memory.most_bytes)}")
        return _line(parts)


class ConsoleDisplay(Callback):
    """Live values of a run on a console: a dashboard on a terminal, elsewhere one line per log interval.

    A context manager, entered after ``step`` of ``total_steps``. The training thread draws the dashboard, at most four
    times a second: a drawing thread would slow it down. Messages are logged, and appear above the dashboard.
    """

    _REDRAW_S = 0.25

    def __init__(
        self, console: Console, step: int, total_steps: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._clock, self._first_step = console, clock, step
        self._dashboard = Dashboard(total_steps, step)
        self._live: Live | None = None
        self._start_s = self._last_draw_s = clock()

    def __enter__(self) -> ConsoleDisplay:
        if self._console.is_terminal and self._console.is_interactive:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
            self._draw(force=True)
        return self

    def __exit__(self, *error: object) -> None:
        """Draw the final state of the dashboard and leave it on the terminal."""
        if self._live is not None:
            self._draw(force=True)
            self._live.stop()
            self._live = None

    def on_step(self, event: StepEvent) -> None:
        """Show loss, throughput and remaining time."""
        dashboard, left = self._dashboard, self._time_left_s(event)
        dashboard.step, dashboard.skipped = event.step, event.n_skipped
        if event.is_skipped:
            return
        if self._live is not None:
            dashboard.add_loss(event.loss)
            dashboard.lr, dashboard.tokens_per_s, dashboard.left_s = event.lr, event.tokens_per_s, left
            self._draw()
        elif event.is_logged:
            figures = (
                f"loss {event.loss:.4f}  lr {event.lr:.2e}  {event.tokens_per_s:,.0f} tokens/s  {_time(left)} left"
            )
            total = str(event.total_steps)
            print_line(self._console, f"step {event.step:>{len(total)}}/{total}  {figures}")

    def on_validation(self, event: ValidationEvent) -> None:
        """Show the validation loss on the dashboard."""
        self._dashboard.validation, self._dashboard.is_best = (event.step, event.result.loss), event.is_best
        self._draw()

    def _time_left_s(self, event: StepEvent) -> float:
        """Return the seconds for the remaining steps at the mean time per step, validations and saves included."""
        per_step = (self._clock() - self._start_s) / max(1, event.step - self._first_step)
        return per_step * (event.total_steps - event.step)

    def _draw(self, force: bool = False) -> None:
        now = self._clock()
        if self._live is None or not (force or now - self._last_draw_s >= self._REDRAW_S):
            return
        self._last_draw_s = now
        self._dashboard.elapsed_s, self._dashboard.memory = now - self._start_s, memory_in_use()
        self._live.update(self._dashboard.render(), refresh=True)


def sparkline(values: Sequence[float]) -> str:
    """Return one block character per value, scaled from minimum to maximum; empty for fewer than two values."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(_BLOCKS[round((value - low) / span * (len(_BLOCKS) - 1))] for value in values)


def _line(parts: list[str]) -> Text:
    return Text("   ".join(parts), no_wrap=True, overflow="ellipsis")


def _time(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"

"""Training progress on a console: a live dashboard on a terminal, one line per log interval elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from psannlm.display import printable
from psannlm.evaluation.loss import Evaluation
from psannlm.runtime.device import MemoryUse, memory_in_use
from psannlm.tokenizers.roundtrip import LOSSY

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


class ConsoleReporter:
    """Reporter for a console: a dashboard on a terminal, otherwise one line per log interval.

    The training thread draws the dashboard, at most four times a second: a drawing thread would slow it down.
    """

    _REDRAW_S = 0.25

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self._clock = clock
        self._dashboard = Dashboard(0)
        self._live: Live | None = None
        self._start_s = self._last_draw_s = 0.0
        self._first_step = self._total = 0

    def notice(self, text: str) -> None:
        """Print a permanent line above the dashboard."""
        self.console.print(Text(printable(text, keep="\n")), soft_wrap=True)

    def start(self, step: int, total_steps: int) -> None:
        """Start the clock, and show the dashboard on a terminal."""
        self._start_s, self._first_step, self._total = self._clock(), step, total_steps
        self._dashboard = Dashboard(total_steps, step)
        if self.console.is_terminal and self.console.is_interactive:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
            self._draw(force=True)

    def step(self, step: int, loss: float, lr: float, tokens_per_s: float, is_logged: bool) -> None:
        """Show loss, throughput and remaining time."""
        left = self._time_left_s(step)
        if self._live is not None:
            dashboard = self._dashboard
            dashboard.add_loss(loss)
            dashboard.step, dashboard.lr = step, lr
            dashboard.tokens_per_s, dashboard.left_s = tokens_per_s, left
            self._draw()
        elif is_logged:
            figures = f"loss {loss:.4f}  lr {lr:.2e}  {tokens_per_s:,.0f} tokens/s  {timedelta(seconds=left)} left"
            self.notice(f"step {step:>{len(str(self._total))}}/{self._total}  {figures}")

    def skipped(self, step: int, n_skipped: int, text: str) -> None:
        """Print which step was skipped and why, and the total so far."""
        self._dashboard.step, self._dashboard.skipped = step, n_skipped
        self.notice(f"skipped {text}; {n_skipped} skipped so far")

    def _time_left_s(self, step: int) -> int:
        """Return the seconds for the remaining steps at the mean time per step, validations and saves included."""
        per_step = (self._clock() - self._start_s) / max(1, step - self._first_step)
        return round(per_step * (self._total - step))

    def _draw(self, force: bool = False) -> None:
        now = self._clock()
        if self._live is None or not (force or now - self._last_draw_s >= self._REDRAW_S):
            return
        self._last_draw_s = now
        self._dashboard.elapsed_s, self._dashboard.memory = now - self._start_s, memory_in_use()
        self._live.update(self._dashboard.render(), refresh=True)

    def evaluation(self, step: int, result: Evaluation, is_best: bool) -> None:
        """Print loss, perplexity and bits per byte."""
        self._dashboard.validation, self._dashboard.is_best = (step, result.loss), is_best
        figures = (
            f"loss {result.loss:.4f}  perplexity {result.perplexity:.2f}  {result.bits_per_byte:.4f} bits per byte"
            f"{LOSSY if result.lossy_tokenizer else ''}"
        )
        self.notice(f"validation at step {step}: {figures}{'  (best so far)' if is_best else ''}")
        self._draw()

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Print prompt and text in one line; metrics.jsonl keeps the line breaks."""
        self.notice(f"sample at step {step}: {' '.join(f'{prompt}{text}'.split())}")

    def saved(self, folder: Path) -> None:
        """Print nothing: checkpoints are routine."""

    def stop(self) -> None:
        """Draw the final state of the dashboard and leave it on the terminal."""
        if self._live is not None:
            self._draw(force=True)
            self._live.stop()
            self._live = None


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

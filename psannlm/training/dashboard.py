"""Where a run stands to three lines on a terminal: how far, how it learns, how fast and with how much memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from psannlm.runtime.device import MemoryUse

_BLOCKS = "▁▂▃▄▅▆▇█"
# Points of the curve at which each two become one; even.
_MOST_POINTS = 18


@dataclass
class Dashboard:
    """What is shown. Losses in nats per token, times in seconds; ``validation`` is (step, loss) of the last one."""

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
        """Take in the loss of one more step; the curve holds means of ever more steps, so that it stays short."""
        self.loss = loss
        self._pending.append(loss)
        if len(self._pending) < self._per_point:
            return
        self.losses.append(sum(self._pending) / len(self._pending))
        self._pending.clear()
        if len(self.losses) == _MOST_POINTS:
            self._per_point *= 2
            self.losses = [(a + b) / 2 for a, b in zip(self.losses[::2], self.losses[1::2], strict=True)]

    def render(self) -> RenderableType:
        """Return the lines, to be drawn as wide as the terminal is."""
        progress = Table.grid(padding=(0, 2), expand=True)
        progress.add_column(no_wrap=True)
        progress.add_column(ratio=1)
        progress.add_column(no_wrap=True)
        left = "" if self.left_s is None else f"   {_time(self.left_s)} left"
        progress.add_row(
            Text(f"step {self.step:,} of {self.total_steps:,}", style="bold"),
            ProgressBar(total=max(1, self.total_steps), completed=self.step),
            Text(f"{_time(self.elapsed_s)} gone{left}"),
        )
        return Group(progress, self._learning(), self._pace())

    def _learning(self) -> Text:
        if self.loss is None:
            return _line(["the first step is on its way"])
        curve = sparkline(self.losses)
        parts = [f"loss {self.loss:.4f}{'  ' if curve else ''}{curve}"]
        if self.validation is not None:
            step, loss = self.validation
            parts.append(f"validation {loss:.4f} at step {step:,}{', best so far' if self.is_best else ''}")
        return _line(parts)

    def _pace(self) -> Text:
        parts = []
        if self.loss is not None:
            parts = [f"{self.tokens_per_s:,.0f} tokens/s", f"lr {self.lr:.2e}"]
        if self.skipped:
            parts.append(f"{self.skipped:,} skipped")
        if self.memory is not None:
            parts.append(f"{self.memory.kind} {_size(self.memory.now_bytes)}, at most {_size(self.memory.most_bytes)}")
        return _line(parts)


def sparkline(values: Sequence[float]) -> str:
    """Return one block per value, its height between the least and the largest of them; nothing for fewer than two."""
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

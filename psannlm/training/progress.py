"""What a run tells while it goes on: a dashboard on a terminal, plain lines elsewhere, nothing for those who ask."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from psannlm.display import printable
from psannlm.evaluation.loss import Evaluation
from psannlm.runtime.device import memory_in_use
from psannlm.tokenizers.roundtrip import LOSSY
from psannlm.training.dashboard import Dashboard


class Reporter(Protocol):
    """Hears of a run's events. Ranks other than the first get the silent one."""

    def notice(self, text: str) -> None:
        """Say something once."""

    def start(self, step: int, total_steps: int) -> None:
        """Training begins after ``step`` of ``total_steps``."""

    def step(self, step: int, loss: float, lr: float, tokens_per_s: float, is_logged: bool) -> None:
        """A step was made; ``is_logged`` at the log interval."""

    def skipped(self, step: int, n_skipped: int, text: str) -> None:
        """A step was left out, the ``n_skipped``-th of the run; ``text`` says which and why."""

    def evaluation(self, step: int, result: Evaluation, is_best: bool) -> None:
        """A validation was made."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """The model continued ``prompt`` with ``text``."""

    def saved(self, folder: Path) -> None:
        """A checkpoint was written."""

    def stop(self) -> None:
        """Training ended, one way or another."""


class Rate:
    """Tokens per second since it was made or restarted, the time of validations and saves left out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._tokens, self._seconds = 0, 0.0
        self._last = self._clock()

    def add(self, n_tokens: int) -> None:
        """Count a step that ends now."""
        now = self._clock()
        self._tokens += n_tokens
        self._seconds, self._last = self._seconds + now - self._last, now

    def pause(self) -> None:
        """Leave out the time since the last step."""
        self._last = self._clock()

    @property
    def tokens_per_s(self) -> float:
        """The rate so far; 0 before the first step."""
        return self._tokens / self._seconds if self._seconds else 0.0


class TimeBudget:
    """``seconds`` from now on; None is all the time in the world."""

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = math.inf if seconds is None else clock() + seconds

    @property
    def is_spent(self) -> bool:
        """Whether that time is over."""
        return self._clock() >= self._end


class SilentReporter:
    """Hears everything and says nothing."""

    def notice(self, text: str) -> None: ...
    def start(self, step: int, total_steps: int) -> None: ...
    def step(self, step: int, loss: float, lr: float, tokens_per_s: float, is_logged: bool) -> None: ...
    def skipped(self, step: int, n_skipped: int, text: str) -> None: ...
    def evaluation(self, step: int, result: Evaluation, is_best: bool) -> None: ...
    def sample(self, step: int, prompt: str, text: str) -> None: ...
    def saved(self, folder: Path) -> None: ...
    def stop(self) -> None: ...


class ConsoleReporter:
    """Shows a run on a console: a dashboard on a terminal, otherwise a plain line at every log interval.

    The dashboard is drawn by the thread that trains, a few times a second at most: one beside it would disturb it.
    """

    _REDRAW_S = 0.25

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self._clock = clock
        self._board = Dashboard(0)
        self._live: Live | None = None
        self._began = self._drawn = 0.0
        self._first_step = self._total = 0

    def notice(self, text: str) -> None:
        """Print a line that stays, above the dashboard."""
        self.console.print(Text(printable(text, keep="\n")), soft_wrap=True)

    def start(self, step: int, total_steps: int) -> None:
        """Begin to measure, and show the dashboard where there is a terminal."""
        self._began, self._first_step, self._total = self._clock(), step, total_steps
        self._board = Dashboard(total_steps, step)
        if self.console.is_terminal and self.console.is_interactive:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
            self._draw(is_due=True)

    def step(self, step: int, loss: float, lr: float, tokens_per_s: float, is_logged: bool) -> None:
        """Show loss, rate and time left."""
        left = self._time_left_s(step)
        if self._live is not None:
            board = self._board
            board.add_loss(loss)
            board.step, board.lr, board.tokens_per_s, board.left_s = step, lr, tokens_per_s, left
            self._draw()
        elif is_logged:
            figures = f"loss {loss:.4f}  lr {lr:.2e}  {tokens_per_s:,.0f} tokens/s  {timedelta(seconds=left)} left"
            self.notice(f"step {step:>{len(str(self._total))}}/{self._total}  {figures}")

    def skipped(self, step: int, n_skipped: int, text: str) -> None:
        """Print why, and how many there were."""
        self._board.step, self._board.skipped = step, n_skipped
        self.notice(f"skipped {text}; {n_skipped} skipped so far")

    def _time_left_s(self, step: int) -> int:
        """Seconds for the remaining steps at the rate so far, validations and saves included."""
        per_step = (self._clock() - self._began) / max(1, step - self._first_step)
        return round(per_step * (self._total - step))

    def _draw(self, is_due: bool = False) -> None:
        now = self._clock()
        if self._live is None or not (is_due or now - self._drawn >= self._REDRAW_S):
            return
        self._drawn = now
        self._board.elapsed_s, self._board.memory = now - self._began, memory_in_use()
        self._live.update(self._board.render(), refresh=True)

    def evaluation(self, step: int, result: Evaluation, is_best: bool) -> None:
        """Print the validation's figures."""
        self._board.validation, self._board.is_best = (step, result.loss), is_best
        figures = (
            f"loss {result.loss:.4f}  perplexity {result.perplexity:.2f}  {result.bits_per_byte:.4f} bits per byte"
            f"{LOSSY if result.lossy_tokenizer else ''}"
        )
        self.notice(f"validation at step {step}: {figures}{'  (best so far)' if is_best else ''}")
        self._draw()

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Print prompt and text in one line; metrics.jsonl has it as it is."""
        self.notice(f"sample at step {step}: {' '.join(f'{prompt}{text}'.split())}")

    def saved(self, folder: Path) -> None:
        """Checkpoints are routine: nothing is said."""

    def stop(self) -> None:
        """Leave the dashboard as it stands."""
        if self._live is not None:
            self._draw(is_due=True)
            self._live.stop()
            self._live = None

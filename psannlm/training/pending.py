"""Late read-back of step metrics: steps given to the device whose loss and gradient norm were not read yet."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from psannlm.data.loader import StepBatch
from psannlm.errors import DivergedError
from psannlm.runtime.device import peak_memory_bytes
from psannlm.training.callbacks import StepEvent
from psannlm.training.checkpoint import TrainerState
from psannlm.training.context import Run
from psannlm.training.failures import MAX_CONSECUTIVE_SKIPS, describe_last_checkpoint, describe_non_finite
from psannlm.training.step import StepResult

log = logging.getLogger(__name__)


class Throughput:
    """Tokens per second since construction or :meth:`restart`, without the time of validations and saves."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Start a new measurement now."""
        self._tokens, self._seconds = 0, 0.0
        self._last = self._clock()

    def add(self, n_tokens: int) -> None:
        """Add a step that ends now."""
        now = self._clock()
        self._tokens += n_tokens
        self._seconds, self._last = self._seconds + now - self._last, now

    def pause(self) -> None:
        """Leave out the time since the last step."""
        self._last = self._clock()

    @property
    def tokens_per_s(self) -> float:
        """Mean throughput of the measurement; 0 before the first step."""
        return self._tokens / self._seconds if self._seconds else 0.0


@dataclass(frozen=True)
class PendingStep:
    """A step that was given to the device, with what is needed to log it once its metrics are read."""

    step: int
    batch: StepBatch
    lr: float
    is_logged: bool
    result: StepResult


class PendingSteps:
    """Queue of steps whose metrics are still on the device, oldest first.

    Reading a metric waits for the device. The loop therefore pushes step n, and drains all but the newest one: step
    n - 1 is read while the device computes step n. Logs, checkpoints and results do not depend on when a step is read.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._steps: deque[PendingStep] = deque()
        self.throughput = Throughput()

    def push(self, step: PendingStep) -> None:
        """Append the newest step."""
        self._steps.append(step)

    def drain(self, state: TrainerState, keep: int = 0) -> TrainerState:
        """Read, log and report all steps but the newest ``keep``; return the state after them.

        Raises:
            DivergedError: a step was not finite, and ``train.on_nonfinite`` is ``stop`` or too many were skipped in a
                row.
        """
        while len(self._steps) > keep:
            step = self._steps.popleft()
            if step.result.may_continue:
                self.throughput.add(step.result.n_labels)
                state = self._complete(state, step)
                if step.is_logged:
                    self.throughput.restart()
            else:
                state = self._skip(state, step)
                self.throughput.pause()
        return state

    def _complete(self, state: TrainerState, pending: PendingStep) -> TrainerState:
        """Log and report a step that updated the weights; return the state after it."""
        run, step, result, after = self._run, pending.step, pending.result, pending.batch.after
        metrics = {"loss": result.loss, "lr": pending.lr, "grad_norm": result.grad_norm}
        rates = run.optimizers.scaled_rates(pending.lr)
        seen = _add(state.source_windows, pending.batch.source_windows)
        tokens, tokens_per_s = state.tokens + result.n_labels, self.throughput.tokens_per_s
        if pending.is_logged and run.log is not None:
            timing = {
                "tokens": tokens,
                "epoch": after.epoch,
                "tokens_per_s": round(tokens_per_s, 1),
                "peak_memory_bytes": peak_memory_bytes(run.precision.device),
            }
            skipped = {"skipped": state.skipped} if state.skipped else {}
            sources = {"source_windows": list(seen)} if seen else {}
            run.log.write("train", step, {**metrics, **rates, **timing, **skipped, **sources})
        self._notify(pending, tokens, state.skipped, is_skipped=False)
        state = replace(state, step=step, position=after, tokens=tokens, metrics=metrics, skipped_in_a_row=0)
        return replace(state, source_windows=seen)

    def _skip(self, state: TrainerState, pending: PendingStep) -> TrainerState:
        """Log and report a step that was skipped because it was not finite; return the state after it."""
        run, step, in_a_row = self._run, pending.step, state.skipped_in_a_row + 1
        found = describe_non_finite(step, pending.result, run.loader, state.position, pending.batch.n_windows)
        last_checkpoint = describe_last_checkpoint(run.folder)
        remedy = "Lower train.lr, lengthen train.warmup_steps, or use amp: fp32"
        if run.config.train.on_nonfinite == "stop":
            raise DivergedError(f"{found}; {last_checkpoint}. {remedy}; train.on_nonfinite: skip skips such steps.")
        if run.log is not None:
            run.log.write("skipped", step, found.as_dict())
        if in_a_row == MAX_CONSECUTIVE_SKIPS:
            raise DivergedError(f"{found}, as in the {in_a_row - 1} steps before; {last_checkpoint}. {remedy}.")
        n_skipped = state.skipped + 1
        log.warning(f"skipped {found}; {n_skipped} skipped so far")
        self._notify(pending, state.tokens, n_skipped, is_skipped=True)
        after, seen = pending.batch.after, _add(state.source_windows, pending.batch.source_windows)
        state = replace(state, step=step, position=after, source_windows=seen)
        return replace(state, skipped=n_skipped, skipped_in_a_row=in_a_row)

    def _notify(self, pending: PendingStep, tokens: int, n_skipped: int, *, is_skipped: bool) -> None:
        event = StepEvent(
            step=pending.step,
            total_steps=self._run.total_steps,
            epoch=pending.batch.after.epoch,
            loss=pending.result.loss,
            lr=pending.lr,
            grad_norm=pending.result.grad_norm,
            tokens=tokens,
            tokens_per_s=self.throughput.tokens_per_s,
            is_skipped=is_skipped,
            n_skipped=n_skipped,
            is_logged=pending.is_logged,
        )
        self._run.notify(lambda callback: callback.on_step(event))


def _add(seen: tuple[int, ...], more: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(seen or (0,) * len(more), more, strict=True))

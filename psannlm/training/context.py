"""The parts that a training loop works with: model, data, optimisers, log, display, callbacks and stop signals."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from psannlm.config.run import RunConfig
from psannlm.data.loader import Loader
from psannlm.data.windows import Windows
from psannlm.evaluation.tasks.validation import ValidationTasks
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import Precision
from psannlm.runtime.distributed import World
from psannlm.tokenizers.base import Tokenizer
from psannlm.training.averaging import WeightAverage
from psannlm.training.callbacks import Callback
from psannlm.training.metrics import MetricsLog
from psannlm.training.optim import OptimizerSet
from psannlm.training.schedule import learning_rate

# (model, tokenizer, prompts, max_new_tokens, seed) -> the continuation of each prompt.
Sampler = Callable[[Transformer, Tokenizer, Sequence[str], int, int], list[str]]


class TimeBudget:
    """A time limit of ``seconds`` from now; None: no limit."""

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = math.inf if seconds is None else clock() + seconds

    @property
    def is_spent(self) -> bool:
        """Whether the limit has passed."""
        return self._clock() >= self._end


@dataclass
class Run:
    """The parts of one training run. What changes from step to step is in ``TrainerState``.

    Attributes:
        module: ``model``, compiled or wrapped for several ranks.
        total_steps: number of the last step.
        full_model: on rank 0 of a sharded run a model in the machine's memory, whose weights are those of the last
            :func:`~psannlm.training.parallel.gather_into`.
        average: exponential moving average of the weights, with ``train.ema``.
        display: gets the events that callbacks get, and never makes the run wait for the device.
        lost_fraction: as in ``PreparedData``.
        stop: set by a signal: finish the current step, save, and raise ``Interrupted``.
        ending: set by the caller: finish the current step, save, and return.
    """

    config: RunConfig
    world: World
    precision: Precision
    model: Transformer
    module: nn.Module
    optimizers: OptimizerSet
    scaler: torch.amp.GradScaler
    loader: Loader
    val_windows: Windows | None
    tokenizer: Tokenizer | None
    folder: Path
    log: MetricsLog | None
    total_steps: int
    lost_fraction: float | None = None
    full_model: Transformer | None = None
    average: WeightAverage | None = None
    sampler: Sampler | None = None
    tasks: ValidationTasks | None = None
    budget: TimeBudget = field(default_factory=TimeBudget)
    stop: threading.Event = field(default_factory=threading.Event)
    callbacks: tuple[Callback, ...] = ()
    display: Callback | None = None
    ending: threading.Event = field(default_factory=threading.Event)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of optimiser step ``step``."""
        settings = self.config.train
        return learning_rate(
            step,
            peak=settings.lr,
            min_lr=settings.min_lr,
            warmup_steps=settings.warmup_steps,
            total_steps=self.total_steps,
            schedule=settings.schedule,
            cooldown_steps=settings.cooldown_steps(self.total_steps),
        )

    @property
    def defer_readback(self) -> bool:
        """Whether to read a step's metrics only after the next step is enqueued, so that a GPU never idles.

        False where the metrics of a step decide its update (``on_nonfinite: skip``, and fp16), and where callbacks
        must see the weights of the very step they are called for. A CPU gains nothing by it.
        """
        is_free = self.config.train.on_nonfinite == "stop" and not (self.scaler.is_enabled() or self.callbacks)
        return is_free and self.precision.device.type == "cuda"

    @property
    def should_stop(self) -> bool:
        """Whether a signal, the caller or the time budget asks this rank to end the run."""
        return self.stop.is_set() or self.ending.is_set() or self.budget.is_spent

    def notify(self, call: Callable[[Callback], None]) -> None:
        """Apply ``call`` to the display and to every callback, on rank 0 only."""
        if self.world.is_main:
            for callback in (*filter(None, [self.display]), *self.callbacks):
                call(callback)

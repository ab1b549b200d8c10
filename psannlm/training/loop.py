"""The training loop: steps, validations, checkpoints and a clean stop, read from top to bottom."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from psannlm.config.run import RunConfig
from psannlm.data.loader import Loader, Position, StepBatch
from psannlm.data.windows import Windows
from psannlm.errors import Interrupted, TrainingError
from psannlm.evaluation.loss import evaluate
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import Precision, Unread, peak_memory_bytes
from psannlm.runtime.distributed import World
from psannlm.tokenizers.base import Tokenizer
from psannlm.training.callbacks import Callback, SaveEvent, StepEvent, ValidationEvent
from psannlm.training.checkpoint import BEST, TrainerState, assist_save, point, prune, save_checkpoint
from psannlm.training.failures import (
    NOT_FINITE,
    TOO_MANY_IN_A_ROW,
    describe_not_finite,
    explaining_memory,
    find_not_finite,
    last_saved,
)
from psannlm.training.metrics import MetricsLog
from psannlm.training.optim import OptimizerSet
from psannlm.training.parallel import is_sharded
from psannlm.training.progress import Rate, Reporter, TimeBudget
from psannlm.training.schedule import learning_rate
from psannlm.training.step import StepResult, seed_step, train_step

# A model, its tokenizer, prompts, tokens at most and a seed to the text that follows each prompt. Handed in, because
# training does not know how text is generated.
Sampler = Callable[[Transformer, Tokenizer, Sequence[str], int, int], list[str]]


@dataclass
class Run:
    """Everything a loop works with. ``module`` is ``model``, compiled or wrapped for the ranks.

    ``lost_fraction`` is as in ``PreparedData``.
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
    reporter: Reporter
    total_steps: int
    identity: dict[str, Any]
    lost_fraction: float | None = None
    sampler: Sampler | None = None
    budget: TimeBudget = field(default_factory=TimeBudget)
    stop: threading.Event = field(default_factory=threading.Event)
    callbacks: tuple[Callback, ...] = ()
    ending: threading.Event = field(default_factory=threading.Event)

    @property
    def looks_back(self) -> bool:
        """Whether a step is looked at when the next one has been enqueued, so that a GPU never waits for this process.

        Not where the outcome of a step decides how it ends: ``on_nonfinite: skip``, and fp16; nor where callbacks are
        to see the weights of the step that they are called for. A CPU gains nothing.
        """
        is_free = self.config.train.on_nonfinite == "stop" and not (self.scaler.is_enabled() or self.callbacks)
        return is_free and self.precision.device.type == "cuda"

    def notify(self, call: Callable[[Callback], None]) -> None:
        """Let ``call`` reach every callback, on rank 0 alone."""
        if self.world.is_main:
            for callback in self.callbacks:
                call(callback)


@dataclass(frozen=True)
class Progress:
    """How far a run has come; the fields are as in ``TrainerState``."""

    step: int = 0
    position: Position = field(default_factory=Position)
    tokens: int = 0
    best: dict[str, Any] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class _Made:
    """A step that was given to the device, and what telling of it takes."""

    step: int
    batch: StepBatch
    lr: float
    is_logged: bool
    result: StepResult


def run_steps(run: Run, progress: Progress) -> Progress:
    """Train from ``progress`` to the last step, or until the time budget is spent; return where the run stands then.

    Where ``run.looks_back``, the result of a step is read one step late, unless the step is logged, validated or saved:
    then all is read. A signal to several ranks ends the run one step later, too.

    Raises:
        Interrupted: ``run.stop`` was set; the step in hand was finished and saved.
        TrainingError: the loss or a gradient is not finite, and ``train.on_nonfinite`` says stop or it is the third in
            a row; the validation loss or a parameter is not; or memory ran out. The parameters are those before the
            step, unless ``run.looks_back``: then they are spoilt, and the last checkpoint is what counts.
        StorageError: a checkpoint could not be written; earlier ones are whole.
    """
    settings, device = run.config.train, run.precision.device
    rate = Rate()
    made: deque[_Made] = deque()
    votes: deque[Unread] = deque(maxlen=2)
    for step, batch in enumerate(run.loader.steps(progress.position), progress.step + 1):
        if step > run.total_steps:
            break
        seed_step(settings.seed, step, run.world.rank)
        lr = learning_rate(
            step,
            peak=settings.lr,
            floor=settings.min_lr,
            warmup_steps=settings.warmup_steps,
            total_steps=run.total_steps,
            schedule=settings.schedule,
            cooldown_steps=settings.cooldown_steps(run.total_steps),
        )
        with explaining_memory(run.config, step):
            result = train_step(
                run.module,
                batch.micro_batches,
                run.optimizers,
                precision=run.precision,
                scaler=run.scaler,
                lr=lr,
                grad_clip=settings.grad_clip,
                label_smoothing=settings.label_smoothing,
                sync_once=settings.grad_sync == "step",
                world=run.world,
                looks_first=not run.looks_back,
            )
        is_last = step == run.total_steps
        is_logged = _is_due(step, settings.log_interval_steps) or is_last or step == 1
        is_validated = is_last or _is_due(step, settings.eval_interval_steps)
        is_saved = is_last or _is_due(step, settings.save_interval_steps)
        looks_now = not run.looks_back or is_logged or is_validated or is_saved
        made.append(_Made(step, batch, lr, is_logged, result))
        progress = _account(run, progress, made, rate, keep=0 if looks_now else 1)

        is_best = False
        if run.val_windows is not None and is_validated:
            progress, is_best = _validate(run, progress, run.val_windows)
            rate.pause()
        votes.append(run.world.send_sum(run.stop.is_set() or run.ending.is_set() or run.budget.is_spent, device))
        is_stopped = votes[-1 if looks_now or run.world.size == 1 else 0].read() != [0.0]
        if is_best or is_saved or is_stopped:
            progress = _account(run, progress, made, rate)
            _save(run, progress, is_best)
            rate.pause()
        if is_stopped and not is_last:
            if not run.world.any(run.stop.is_set(), device):
                break
            raise Interrupted(
                f"stopped after step {step} of {run.total_steps}; saved in {run.folder}; the same command goes on"
            )
    return progress


def _account(run: Run, progress: Progress, made: deque[_Made], rate: Rate, keep: int = 0) -> Progress:
    """Take the steps of ``made`` but the last ``keep``, tell what they came to, and return where the run stands then.

    Raises:
        TrainingError: one was not finite, and ``train.on_nonfinite`` is ``stop`` or too many were left out in a row.
    """
    while len(made) > keep:
        one = made.popleft()
        if one.result.is_finite:
            rate.add(one.result.n_labels)
            progress = _count(run, progress, one, rate)
            if one.is_logged:
                rate.restart()
        else:
            progress = _skip(run, progress, one, rate)
            rate.pause()
    return progress


def _count(run: Run, progress: Progress, one: _Made, rate: Rate) -> Progress:
    """Log and tell a step that was made; return where the run stands after it."""
    step, result, after = one.step, one.result, one.batch.after
    figures = {"loss": result.loss, "lr": one.lr, "grad_norm": result.grad_norm}
    tokens = progress.tokens + result.n_labels
    if one.is_logged and run.log is not None:
        timing = {
            "tokens": tokens,
            "epoch": after.epoch,
            "tokens_per_s": round(rate.tokens_per_s, 1),
            "peak_memory_bytes": peak_memory_bytes(run.precision.device),
        }
        skipped = {"skipped": progress.skipped} if progress.skipped else {}
        run.log.write("train", step, {**figures, **timing, **skipped})
    run.reporter.step(step, result.loss, one.lr, rate.tokens_per_s, one.is_logged)
    event = _step_event(run, one, tokens, rate, is_skipped=False)
    run.notify(lambda callback: callback.on_step(event))
    return replace(progress, step=step, position=after, tokens=tokens, metrics=figures, skipped_in_a_row=0)


def _skip(run: Run, progress: Progress, one: _Made, rate: Rate) -> Progress:
    """Log and tell a step that was left out for not being finite; return where the run stands after it."""
    step, after, in_a_row = one.step, one.batch.after, progress.skipped_in_a_row + 1
    found = describe_not_finite(step, one.result, run.loader, progress.position, one.batch.n_windows)
    remedy = "Lower train.lr, lengthen train.warmup_steps, or use amp: fp32"
    if run.config.train.on_nonfinite == "stop":
        raise TrainingError(
            f"{found}; {last_saved(run.folder)}. {remedy}; train.on_nonfinite: skip leaves such steps out."
        )
    if run.log is not None:
        run.log.write("skipped", step, found.as_dict())
    if in_a_row == TOO_MANY_IN_A_ROW:
        raise TrainingError(f"{found}, as in the {in_a_row - 1} steps before; {last_saved(run.folder)}. {remedy}.")
    run.reporter.skipped(step, progress.skipped + 1, str(found))
    event = _step_event(run, one, progress.tokens, rate, is_skipped=True)
    run.notify(lambda callback: callback.on_step(event))
    return replace(progress, step=step, position=after, skipped=progress.skipped + 1, skipped_in_a_row=in_a_row)


def _step_event(run: Run, one: _Made, tokens: int, rate: Rate, *, is_skipped: bool) -> StepEvent:
    return StepEvent(
        step=one.step,
        total_steps=run.total_steps,
        epoch=one.batch.after.epoch,
        loss=one.result.loss,
        lr=one.lr,
        grad_norm=one.result.grad_norm,
        tokens=tokens,
        tokens_per_s=rate.tokens_per_s,
        is_skipped=is_skipped,
    )


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _validate(run: Run, progress: Progress, windows: Windows) -> tuple[Progress, bool]:
    """Evaluate, log, and say whether this is the lowest validation loss so far."""
    batch_size = run.loader.micro_batch_size
    result = evaluate(run.model, windows, precision=run.precision, batch_size=batch_size, world=run.world)
    result = replace(result, lost_fraction=run.lost_fraction)
    if not math.isfinite(result.loss):
        raise TrainingError(
            f"step {progress.step}: validation loss {result.loss:g} is {NOT_FINITE}; {last_saved(run.folder)}."
        )
    is_best = progress.best is None or result.loss < progress.best["loss"]
    if run.log is not None:
        run.log.write("eval", progress.step, result.as_dict())
    run.reporter.evaluation(progress.step, result, is_best)
    event = ValidationEvent(progress.step, result, is_best)
    run.notify(lambda callback: callback.on_validation(event))
    # One rank alone has no whole weights of a sharded model to write with.
    if run.world.is_main and not is_sharded(run.model):
        _sample(run, progress.step)
    best = {"step": progress.step, **result.as_dict()} if is_best else progress.best
    metrics = {**progress.metrics, **{f"val_{k}": v for k, v in result.as_dict().items()}}
    return replace(progress, best=best, metrics=metrics), is_best


def _sample(run: Run, step: int) -> None:
    """Let the model write what people can read, for the log and the reporter."""
    settings = run.config.train
    prompts = settings.sample_prompts
    if run.sampler is None or run.tokenizer is None or not prompts:
        return
    texts = run.sampler(run.model, run.tokenizer, prompts, settings.sample_tokens, settings.seed)
    for prompt, text in zip(prompts, texts, strict=True):
        if run.log is not None:
            run.log.write("sample", step, {"prompt": prompt, "text": text})
        run.reporter.sample(step, prompt, text)


def _save(run: Run, progress: Progress, is_best: bool) -> None:
    tensors = chain(run.model.state_dict().items(), run.optimizers.tensors().items())
    spoilt = find_not_finite(tensors)
    if run.world.any(spoilt is not None, run.precision.device):
        raise TrainingError(
            f"after step {progress.step} {spoilt or 'a tensor of another rank'} is {NOT_FINITE}, and nothing was saved"
            f"; {last_saved(run.folder)}. Lower train.lr, or lengthen train.warmup_steps."
        )
    if run.world.is_main:
        state = TrainerState(
            step=progress.step,
            position=progress.position,
            tokens=progress.tokens,
            config=run.config.model_dump(mode="json"),
            best=progress.best,
            metrics=progress.metrics,
            scaler=run.scaler.state_dict(),
            skipped=progress.skipped,
            skipped_in_a_row=progress.skipped_in_a_row,
            total_steps=run.total_steps,
            **run.identity,
        )
        folder = save_checkpoint(run.folder, run.model, run.tokenizer, run.optimizers.tensors(), state)
        if is_best:
            point(run.folder, BEST, progress.step)
        keep = run.config.train.keep_checkpoints
        prune(run.folder, keep, None if progress.best is None else progress.best["step"])
        run.reporter.saved(folder)
        event = SaveEvent(progress.step, folder, is_best)
        run.notify(lambda callback: callback.on_save(event))
    else:
        assist_save(run.model, run.optimizers.tensors())
    run.world.wait()

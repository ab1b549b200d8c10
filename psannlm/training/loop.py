"""The training loop: steps, validations, checkpoints and a clean stop, read from top to bottom."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from psannlm.config.run import RunConfig
from psannlm.data.loader import Loader, Position
from psannlm.data.windows import Windows
from psannlm.device import Precision
from psannlm.distributed import World
from psannlm.errors import Interrupted, TrainingError
from psannlm.evaluation import evaluate
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.base import Tokenizer
from psannlm.training.checkpoint import BEST, TrainerState, list_checkpoints, point, prune, save_checkpoint
from psannlm.training.metrics import MetricsLog
from psannlm.training.optim import OptimizerSet
from psannlm.training.progress import Rate, Reporter
from psannlm.training.schedule import learning_rate
from psannlm.training.step import StepResult, seed_step, train_step


@dataclass
class Run:
    """Everything a loop works with. ``module`` is ``model``, compiled or wrapped for the ranks."""

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
    identity: dict[str, str]
    stop: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Progress:
    """How far a run has come; ``best`` and ``metrics`` as in ``TrainerState``."""

    step: int = 0
    position: Position = field(default_factory=Position)
    tokens: int = 0
    best: dict[str, Any] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


def run_steps(run: Run, progress: Progress) -> Progress:
    """Train from ``progress`` to the last step; return where the run stands then.

    Raises:
        Interrupted: ``run.stop`` was set; the step in hand was finished and saved.
        TrainingError: the loss or a gradient is not finite (the parameters are those before the step), or the
            validation loss is not.
        StorageError: a checkpoint could not be written; earlier ones are whole.
    """
    settings = run.config.train
    rate = Rate()
    for batch in run.loader.steps(progress.position):
        if progress.step >= run.total_steps:
            break
        step = progress.step + 1
        seed_step(settings.seed, step, run.world.rank)
        lr = learning_rate(
            step,
            peak=settings.lr,
            floor=settings.min_lr,
            warmup_steps=settings.warmup_steps,
            total_steps=run.total_steps,
            schedule=settings.schedule,
        )
        result = train_step(
            run.module,
            batch.micro_batches,
            run.optimizers,
            precision=run.precision,
            scaler=run.scaler,
            lr=lr,
            grad_clip=settings.grad_clip,
            label_smoothing=settings.label_smoothing,
            world=run.world,
        )
        if not result.is_finite:
            window_ids = np.concatenate([b.window_ids for b in batch.micro_batches])
            raise TrainingError(_not_finite(run, step, result, window_ids))
        rate.add(result.n_labels)
        figures = {"loss": result.loss, "lr": lr, "grad_norm": result.grad_norm}
        progress = Progress(step, batch.after, progress.tokens + result.n_labels, progress.best, figures)
        is_last = step == run.total_steps
        is_logged = step % settings.log_interval_steps == 0 or is_last or step == 1
        if is_logged and run.log is not None:
            timing = {
                "tokens": progress.tokens,
                "epoch": batch.after.epoch,
                "tokens_per_s": round(rate.tokens_per_s, 1),
            }
            run.log.write("train", step, {**figures, **timing})
        run.reporter.step(step, result.loss, lr, rate.tokens_per_s, is_logged)
        if is_logged:
            rate = Rate()

        is_best = False
        if run.val_windows is not None and (is_last or _is_due(step, settings.eval_interval_steps)):
            progress, is_best = _validate(run, progress, run.val_windows)
            rate.pause()
        is_stopped = run.world.any(run.stop.is_set(), run.precision.device)
        if is_best or is_last or is_stopped or _is_due(step, settings.save_interval_steps):
            _save(run, progress, is_best)
            rate.pause()
        if is_stopped and not is_last:
            raise Interrupted(
                f"stopped after step {step} of {run.total_steps}; saved in {run.folder}; the same command goes on"
            )
    return progress


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _validate(run: Run, progress: Progress, windows: Windows) -> tuple[Progress, bool]:
    """Evaluate, log, and say whether this is the lowest validation loss so far."""
    batch_size = run.loader.micro_batch_size
    result = evaluate(run.model, windows, precision=run.precision, batch_size=batch_size, world=run.world)
    if not math.isfinite(result.loss):
        raise TrainingError(f"step {progress.step}: validation loss {result.loss:g} is not finite; {_last_saved(run)}.")
    is_best = progress.best is None or result.loss < progress.best["loss"]
    if run.log is not None:
        run.log.write("eval", progress.step, result.as_dict())
    run.reporter.evaluation(progress.step, result, is_best)
    best = {"step": progress.step, **result.as_dict()} if is_best else progress.best
    metrics = {**progress.metrics, **{f"val_{k}": v for k, v in result.as_dict().items()}}
    return replace(progress, best=best, metrics=metrics), is_best


def _save(run: Run, progress: Progress, is_best: bool) -> None:
    if run.world.is_main:
        state = TrainerState(
            step=progress.step,
            position=progress.position,
            tokens=progress.tokens,
            config=run.config.model_dump(mode="json"),
            best=progress.best,
            metrics=progress.metrics,
            scaler=run.scaler.state_dict(),
            **run.identity,
        )
        folder = save_checkpoint(run.folder, run.model, run.tokenizer, run.optimizers.tensors(), state)
        if is_best:
            point(run.folder, BEST, progress.step)
        keep = run.config.train.keep_checkpoints
        prune(run.folder, keep, None if progress.best is None else progress.best["step"])
        run.reporter.saved(folder)
    run.world.wait()


def _not_finite(run: Run, step: int, result: StepResult, window_ids: np.ndarray[Any, Any]) -> str:
    source = "; ".join(run.loader.windows.describe(int(i)) for i in window_ids[:4])
    return (
        f"step {step}: loss {result.loss:g}, gradient norm {result.grad_norm:g}: not finite. Windows "
        f"{window_ids[:8].tolist()} ({source}); {_last_saved(run)}. Lower train.lr, lengthen train.warmup_steps, or "
        "use amp: fp32."
    )


def _last_saved(run: Run) -> str:
    saved = list_checkpoints(run.folder)
    return f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet"

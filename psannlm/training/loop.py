"""The training loop: steps, validation, checkpoints and a clean stop."""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import replace
from itertools import chain

from psannlm.data.windows import Windows
from psannlm.errors import DivergedError, Interrupted
from psannlm.evaluation.loss import evaluate
from psannlm.evaluation.tasks.validation import task_figures
from psannlm.runtime.device import AsyncReadback
from psannlm.training.callbacks import SaveEvent, ValidationEvent
from psannlm.training.checkpoint import BEST, TrainerState, participate_in_save, point, prune, save_checkpoint
from psannlm.training.context import Run
from psannlm.training.failures import NOT_FINITE, describe_last_checkpoint, explain_oom, find_non_finite
from psannlm.training.parallel import is_sharded
from psannlm.training.pending import PendingStep, PendingSteps
from psannlm.training.step import seed_step, train_step

log = logging.getLogger(__name__)


def run_steps(run: Run, state: TrainerState) -> TrainerState:
    """Train from ``state`` to the last step, or until the run is asked to end; return the state then.

    With ``run.defer_readback``, the metrics of a step are read one step late, unless the step is logged, validated or
    saved. A signal to one of several ranks then also ends the run one step later.

    Raises:
        Interrupted: ``run.stop`` was set; the current step was finished and saved.
        DivergedError: the loss or a gradient is not finite, and ``train.on_nonfinite`` is stop or it is the third step
            in a row; or the validation loss or a parameter is not finite. The parameters are those before the step;
            with ``run.defer_readback`` they may already be non-finite: resume from the last checkpoint.
        TrainingError: memory ran out.
        StorageError: a checkpoint could not be written; earlier ones are undamaged.
    """
    settings, device = run.config.train, run.precision.device
    pending = PendingSteps(run)
    stop_flags: deque[AsyncReadback] = deque(maxlen=2)
    if state.step == 0 and state.lineage is not None and run.val_windows is not None:
        _validate_parent(run, run.val_windows, str(state.lineage["path"]))
    for step, batch in enumerate(run.loader.steps(state.position), state.step + 1):
        if step > run.total_steps:
            break
        seed_step(settings.seed, step, run.world.rank)
        lr = run.learning_rate(step)
        with explain_oom(run.config, step):
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
                sync_before_update=not run.defer_readback,
            )
        is_last = step == run.total_steps
        is_logged = _is_due(step, settings.log_interval_steps) or is_last or step == 1
        is_validated = is_last or _is_due(step, settings.eval_interval_steps)
        is_saved = is_last or _is_due(step, settings.save_interval_steps)
        reads_now = not run.defer_readback or is_logged or is_validated or is_saved
        pending.push(PendingStep(step, batch, lr, is_logged, result))
        state = pending.drain(state, keep=0 if reads_now else 1)

        is_best = False
        if run.val_windows is not None and is_validated:
            state, is_best = _validate(run, state, run.val_windows)
            pending.throughput.pause()
        # All ranks must decide alike: the sum of their flags is positive if any of them should stop.
        stop_flags.append(run.world.all_reduce_async(run.should_stop, device))
        is_stopped = stop_flags[-1 if reads_now or run.world.size == 1 else 0].read() != [0.0]
        if is_best or is_saved or is_stopped:
            state = pending.drain(state)
            _save(run, state, is_best)
            pending.throughput.pause()
        if is_stopped and not is_last:
            if not run.world.any(run.stop.is_set(), device):
                break
            where = f"after step {step} of {run.total_steps}; saved in {run.folder}"
            raise Interrupted(f"stopped {where}; run the same command to resume")
    return state


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _validate_parent(run: Run, windows: Windows, name: str) -> None:
    """Report and log the validation loss of the weights that the run starts from, as rows of a kind of their own.

    It is not a validation of the run: no checkpoint has these weights, so that they cannot be its best.
    """
    result = evaluate(
        run.model, windows, precision=run.precision, batch_size=run.loader.micro_batch_size, world=run.world
    )
    if run.log is not None:
        run.log.write("parent", 0, replace(result, lost_fraction=run.lost_fraction).as_dict())
    log.info(f"before the first step: validation loss {result.loss:.4f} nats per token, with the weights of {name}")


def _validate(run: Run, state: TrainerState, windows: Windows) -> tuple[TrainerState, bool]:
    """Evaluate and log; return the new state, and whether this is the lowest validation loss so far."""
    n_rows = run.loader.micro_batch_size
    result = evaluate(run.model, windows, precision=run.precision, batch_size=n_rows, world=run.world)
    result = replace(result, lost_fraction=run.lost_fraction)
    if not math.isfinite(result.loss):
        found = f"step {state.step}: validation loss {result.loss:g} is {NOT_FINITE}"
        raise DivergedError(f"{found}; {describe_last_checkpoint(run.folder)}.")
    is_best = state.best is None or result.loss < state.best["loss"]
    if run.log is not None:
        run.log.write("eval", state.step, result.as_dict())
    event = ValidationEvent(state.step, result, is_best)
    log.info(event)
    run.notify(lambda callback: callback.on_validation(event))
    # No rank alone holds all weights of a sharded model.
    if run.world.is_main and not is_sharded(run.model):
        _sample(run, state.step)
        _score_tasks(run, state.step)
    best = {"step": state.step, **result.as_dict()} if is_best else state.best
    metrics = {**state.metrics, **{f"val_{k}": v for k, v in result.as_dict().items()}}
    return replace(state, best=best, metrics=metrics), is_best


def _sample(run: Run, step: int) -> None:
    """Continue ``train.sample_prompts`` with the model; log and report the texts."""
    settings, prompts = run.config.train, run.config.train.sample_prompts
    if run.sampler is None or run.tokenizer is None or not prompts:
        return
    texts = run.sampler(run.model, run.tokenizer, prompts, settings.sample_tokens, settings.seed)
    for prompt, text in zip(prompts, texts, strict=True):
        if run.log is not None:
            run.log.write("sample", step, {"prompt": prompt, "text": text})
        # In one line; metrics.jsonl keeps the line breaks.
        log.info(f"sample at step {step}: {' '.join(f'{prompt}{text}'.split())}")


def _score_tasks(run: Run, step: int) -> None:
    """Score the model on ``train.eval_tasks``; log and report the scores."""
    if run.tasks is None:
        return
    scores = run.tasks.score(run.model)
    if run.log is not None:
        run.log.write("tasks", step, task_figures(scores))
    for score in scores:
        error = "" if score.stderr is None else f" ± {score.stderr:.3f}"
        log.info(f"step {step}: {score.task} {score.value:.3f}{error} (chance {score.chance:.3f})")


def _save(run: Run, state: TrainerState, is_best: bool) -> None:
    """Write a checkpoint of ``state`` on rank 0, prune older ones, and report it; every rank must call it."""
    optimizer_tensors = run.optimizers.tensors()
    bad_tensor = find_non_finite(chain(run.model.state_dict().items(), optimizer_tensors.items()))
    if run.world.any(bad_tensor is not None, run.precision.device):
        raise DivergedError(
            f"after step {state.step} {bad_tensor or 'a tensor of another rank'} is {NOT_FINITE}, and nothing was saved"
            f"; {describe_last_checkpoint(run.folder)}. Lower train.lr, or lengthen train.warmup_steps."
        )
    if not run.world.is_main:
        participate_in_save(run.model, optimizer_tensors)
        run.world.wait()
        return
    state = replace(state, scaler=run.scaler.state_dict())
    folder = save_checkpoint(run.folder, run.model, run.tokenizer, optimizer_tensors, state)
    if is_best:
        point(run.folder, BEST, state.step)
    prune(run.folder, run.config.train.keep_checkpoints, None if state.best is None else state.best["step"])
    run.notify(lambda callback: callback.on_save(SaveEvent(state.step, folder, is_best)))
    run.world.wait()

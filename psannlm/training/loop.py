"""The training loop: steps, validation, checkpoints and a clean stop."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import chain

from psannlm.errors import DivergedError, Interrupted
from psannlm.runtime.device import AsyncReadback
from psannlm.runtime.distributed import World
from psannlm.training.callbacks import SaveEvent
from psannlm.training.checkpoint import BEST, TrainerState, point, prune, save_checkpoint
from psannlm.training.context import Run
from psannlm.training.failures import NOT_FINITE, describe_last_checkpoint, explain_oom, find_non_finite
from psannlm.training.parallel import is_sharded
from psannlm.training.pending import PendingStep, PendingSteps
from psannlm.training.step import seed_step, train_step
from psannlm.training.validation import validate, validate_parent


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
        validate_parent(run, run.val_windows, str(state.lineage["path"]))
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
        # Where the read-back is deferred, a non-finite step ends the run, and its average is never saved.
        if run.average is not None and (run.defer_readback or result.is_finite):
            run.average.update()
        is_last = step == run.total_steps
        is_logged = _is_due(step, settings.log_interval_steps) or is_last or step == 1
        is_validated = is_last or _is_due(step, settings.eval_interval_steps)
        is_saved = is_last or _is_due(step, settings.save_interval_steps) or step in settings.keep_steps
        reads_now = not run.defer_readback or is_logged or is_validated or is_saved
        pending.push(PendingStep(step, batch, lr, is_logged, result))
        state = pending.drain(state, keep=0 if reads_now else 1)

        is_best = False
        if run.val_windows is not None and is_validated:
            state, is_best = validate(run, state, run.val_windows)
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


def _save(run: Run, state: TrainerState, is_best: bool) -> None:
    """Write a checkpoint of ``state`` on rank 0, prune older ones, and report it; every rank must call it."""
    optimizer_tensors = run.optimizers.tensors()
    bad_tensor = find_non_finite(chain(run.model.state_dict().items(), optimizer_tensors.items()))
    if run.world.any(bad_tensor is not None, run.precision.device):
        raise DivergedError(
            f"after step {state.step} {bad_tensor or 'a tensor of another rank'} is {NOT_FINITE}, and nothing was saved"
            f"; {describe_last_checkpoint(run.folder)}. Lower train.lr, or lengthen train.warmup_steps."
        )
    # Every rank of a sharded model writes its shards; of replicas, one is enough.
    writers = run.world if is_sharded(run.model) else World()
    if not run.world.is_main and writers.size == 1:
        run.world.wait()
        return
    state = replace(state, scaler=run.scaler.state_dict())
    folder = save_checkpoint(run.folder, run.model, run.tokenizer, optimizer_tensors, state, run.average, writers)
    if not run.world.is_main:
        run.world.wait()
        return
    if is_best:
        point(run.folder, BEST, state.step)
    kept = {*run.config.train.keep_steps, *(() if state.best is None else (state.best["step"],))}
    prune(run.folder, run.config.train.keep_checkpoints, kept)
    run.notify(lambda callback: callback.on_save(SaveEvent(state.step, folder, is_best)))
    run.world.wait()

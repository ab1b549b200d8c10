"""Training run from a configuration: build the parts, run the loop, write the results."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from psannlm.config.run import RunConfig, plan_batches, plan_mesh, to_yaml
from psannlm.data.loader import Position
from psannlm.data.prepare import PreparedData, load_corpus
from psannlm.errors import Interrupted, PictureError, StorageError, TrainingError
from psannlm.evaluation.tasks.validation import ValidationTasks
from psannlm.io.atomic import explain_write_errors, remove_leftovers, write_text
from psannlm.io.code_identity import CODE_KEY, code_of_run
from psannlm.io.lock import RunLock
from psannlm.io.readers import Unreadable, read_json
from psannlm.io.run_metadata import system_info, write_json
from psannlm.kernels.compiler import missing_to_compile, require_compiler
from psannlm.models.accounting import Place, refuse_oversize
from psannlm.models.artifact import load_model
from psannlm.models.registry import build_model, resolve
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import Precision, describe_device, pick_precision
from psannlm.runtime.distributed import World, local_ranks, process_group, world_from_env
from psannlm.runtime.live_line import live_line
from psannlm.runtime.log import without_messages
from psannlm.runtime.progress import OnProgress, ignore_progress
from psannlm.runtime.shared_folder import require_shared
from psannlm.runtime.signals import stopping_on_signals
from psannlm.tokenizers.base import MIN_VOCAB_SIZE
from psannlm.tokenizers.roundtrip import is_lossy
from psannlm.training.averaging import WeightAverage
from psannlm.training.callbacks import Callback, TrainResult
from psannlm.training.checkpoint import BEST, TrainerState, read_pointer, step_folder
from psannlm.training.console import ConsoleDisplay
from psannlm.training.context import Run, Sampler, TimeBudget
from psannlm.training.initial import Parent, load_parent, refuse_other_tokenizer, with_parent_model
from psannlm.training.loop import run_steps
from psannlm.training.metrics import MetricsLog, TensorBoardLog, draw_curve, read_metrics, require_tensorboard
from psannlm.training.optim import build_optimizers
from psannlm.training.parallel import gather_into, is_sharded, place_model, rank_identity
from psannlm.training.plan import (
    build_loader,
    config_warnings,
    cut_windows,
    decide_compiling,
    last_step,
    place_of,
    refuse_validation_without_data,
    run_flops,
)
from psannlm.training.resume import (
    archive_newer_checkpoints,
    find_state,
    identity,
    move_aside,
    preparation,
    refuse_other_data,
    refuse_past_schedule,
    restore,
    same_model,
)
from psannlm.training.run_folder import (
    CONFIG_FILE,
    SYSTEM_FILE,
    RunStatus,
    has_same_config,
    recording_failure,
    recording_rank_failure,
    refuse_foreign_files,
    write_status,
)

log = logging.getLogger(__name__)


def train(
    config: RunConfig,
    *,
    resume: str = "auto",
    console: Console | None = None,
    data: PreparedData | None = None,
    model: Transformer | None = None,
    sampler: Sampler | None = None,
    time_budget_s: float | None = None,
    callbacks: Sequence[Callback] = (),
    ending: threading.Event | None = None,
) -> TrainResult:
    """Train as ``config`` describes and return the result.

    Args:
        resume: ``auto`` resumes from the latest valid checkpoint of the run folder, which must have the same
            configuration; ``never`` starts from scratch, after renaming an existing run folder; any other value is
            the path of a checkpoint to start from, whose ``train`` settings may differ.
        console: shows progress on rank 0; None: no progress. Messages are logged in either case.
        data: a prepared corpus; None prepares ``config.data``.
        model: model to train in place; None builds ``config.model``.
        sampler: continues ``train.sample_prompts`` at each validation; None: no samples.
        time_budget_s: seconds from now after which the current step is finished and saved, and the run ends; the same
            call resumes it. At least one step is run.
        callbacks: called on rank 0 after each step, validation and save, and at the end.
        ending: set it to end the run as if its time budget were spent.

    Raises:
        ConfigError: the run folder holds a run of another configuration; the message lists the keys that differ.
        Interrupted: Ctrl-C or SIGTERM; the state was saved.
        PsannlmError: any error of the packages that it calls.
    """
    budget = TimeBudget(time_budget_s)
    config = with_parent_model(config, resume)
    if config.train.tensorboard:
        require_tensorboard()
    world = world_from_env(config.train.ddp, config.train.fsdp)
    plan_batches(config, world.size)  # refuses a global batch that the ranks cannot divide, before the corpus is read
    device = world.pick_device(config.train.device)
    precision = pick_precision(config.train.amp, device)
    if config.train.compile is True:
        require_compiler(device)
    place = place_of(config, world, device)
    if model is None:
        refuse_oversize(config.model, MIN_VOCAB_SIZE, place)
    folder = Path(os.path.expanduser(config.train.checkpoint_dir))
    # Take the lock inside the process group, so that all ranks end if it is refused.
    with (
        recording_rank_failure(folder) if world.is_main else nullcontext(),
        process_group(world, device, rank_identity(config) if world.size > 1 else None),
        nullcontext() if world.is_main else without_messages(),
        RunLock(folder) if world.is_main else nullcontext() as lock,
    ):
        if lock is not None:
            _clear_folder(lock, folder, config, resume)
        world.wait()
        if config.train.fsdp != "off":
            require_shared(folder, world, device)
        with live_line(console) if console is not None and world.is_main else nullcontext() as line:
            on_progress = ignore_progress if line is None else line.show
            start = _find_start(config, folder, resume, data, model, world, place, on_progress)
        world.wait()
        run, state = _build(config, start, world, precision, folder)
        run.sampler, run.budget, run.callbacks = sampler, budget, tuple(callbacks)
        run.ending = ending or run.ending
        run.tasks = _validation_tasks(run)
        _announce(run, state, start, lock)
        began = time.monotonic()
        state = _run_loop(run, state, console if world.is_main else None)
        curve = _draw(run)
        if is_sharded(run.model):
            # Gather the full weights on rank 0, and on ranks whose caller passed a full model.
            gather_into(start.model if world.is_main or model is not None else None, run.model)
        result = _result(run, state, start, folder, curve, time.monotonic() - began)
        run.notify(lambda callback: callback.on_end(result))
        return result


def _clear_folder(lock: RunLock, folder: Path, config: RunConfig, resume: str) -> None:
    """Remove what a killed run left half written, and with ``resume`` never the former run too."""
    with explain_write_errors(folder):
        remove_leftovers(folder)
    if resume == "never":
        move_aside(lock)
    refuse_foreign_files(folder, config, config.train.max_steps)


def _announce(run: Run, state: TrainerState, start: _Start, lock: RunLock | None) -> None:
    """Log what is trained and from where, and describe it in the run folder, whose later checkpoints move aside."""
    if start.found is not None:
        if lock is not None:
            archive_newer_checkpoints(lock, start.found[0], state.best)
        log.info(f"resuming from {start.found[0]}: step {state.step} of {run.total_steps}")
    _describe_run(run)
    if run.world.is_main:
        _write_description(run.folder, run.config, state.lineage, is_resumed=start.found is not None)


def _result(
    run: Run, state: TrainerState, start: _Start, folder: Path, curve: Path | None, seconds: float
) -> TrainResult:
    return TrainResult(
        model=start.model.eval(),
        folder=folder,
        checkpoint=read_pointer(folder, BEST) or step_folder(folder, state.step),
        curve=curve,
        steps=state.step,
        total_steps=run.total_steps,
        epochs=state.position.epoch + state.position.window / len(run.loader.windows),
        tokens=state.tokens,
        parameters=_n_parameters(start.model),
        skipped=state.skipped,
        seconds=seconds,
        train_loss=float(state.metrics.get("loss", float("nan"))),
        best=state.best,
        ema=state.ema,
        val_overlap=start.data.val_overlap,
        lossy_tokenizer=is_lossy(start.data.lost_fraction),
    )


def _run_loop(run: Run, state: TrainerState, console: Console | None) -> TrainerState:
    """Run the loop with its log, progress display and signal handlers; return the state at its end."""
    try:
        with (
            recording_failure(run.folder) if run.world.is_main else nullcontext(),
            _logging(run, state.step),
            ConsoleDisplay(console, state.step, run.total_steps) if console else nullcontext() as run.display,
            stopping_on_signals(run.stop),
        ):
            state = run_steps(run, state)
    except (Interrupted, TrainingError):
        # The loss curve helps to find the cause.
        _draw(run)
        raise
    finally:
        # Release the DDP wrapper while the process group exists. If the wrapper held the last reference to the group,
        # destroying the group would deadlock: it waits, holding the GIL, for a thread that needs the GIL.
        run.module = run.model
        gc.collect()
    is_finished = state.step >= run.total_steps
    if run.world.is_main:
        write_status(run.folder, RunStatus.FINISHED if is_finished else RunStatus.STOPPED)
    if not is_finished:
        reason = "stopped on request" if run.ending.is_set() else "the time budget is spent"
        where = f"after step {state.step} of {run.total_steps}; saved in {run.folder}"
        log.info(f"{reason} {where}; run the same command to resume")
    return state


@dataclass(frozen=True)
class _Start:
    """Inputs of a run: the checkpoint to resume from, if any, the data, the weights, and where new ones come from."""

    found: tuple[Path, TrainerState] | None
    data: PreparedData
    model: Transformer
    lineage: dict[str, Any] | None = None


def _find_start(
    config: RunConfig,
    folder: Path,
    resume: str,
    data: PreparedData | None,
    model: Transformer | None,
    world: World,
    place: Place,
    on_progress: OnProgress,
) -> _Start:
    """Find the checkpoint, prepare the data and build or load the weights, unless they are given.

    New weights that will be sharded are built on rank 0 only, which sends the shards to the others.
    """
    found = find_state(config, folder, resume)
    loaded = None if found is None else load_model(found[0])
    parent = load_parent(config) if found is None and config.train.init_from is not None else None
    if data is None:
        tokenizer = parent.tokenizer if parent is not None else None if loaded is None else loaded.tokenizer
        data = load_corpus(config.data, tokenizer, preparation(found), on_progress=on_progress)
        refuse_validation_without_data(config, data)
    if found is not None:
        refuse_other_data(found, data)
    vocab_size = data.tokenizer.vocab_size
    if parent is not None:
        return _start_from(parent, data, model, vocab_size, place)
    if loaded is not None:
        model = same_model(loaded.model, model)
    elif model is None:
        resolved = resolve(config.model, vocab_size=vocab_size, max_seq_len=config.data.max_length)
        refuse_oversize(resolved, vocab_size, place)
        is_elsewhere = config.train.is_sharded and not world.is_main
        model = build_model(resolved, seed=config.train.seed, device="meta" if is_elsewhere else "cpu")
    else:
        resolve(model.config, vocab_size=vocab_size)  # refuses a model with fewer rows than ids
    return _Start(found, data, model)


def _start_from(parent: Parent, data: PreparedData, model: Transformer | None, vocab_size: int, place: Place) -> _Start:
    refuse_other_tokenizer(parent, data)
    refuse_oversize(resolve(parent.model.config, vocab_size=vocab_size), vocab_size, place)
    return _Start(None, data, same_model(parent.model, model), parent.lineage)


def _build(
    config: RunConfig, start: _Start, world: World, precision: Precision, folder: Path
) -> tuple[Run, TrainerState]:
    """Build the parts of a run and restore the checkpoint into them. Nothing is written."""
    data = start.data
    loader = build_loader(config, data, world, pin_memory=precision.device.type == "cuda")
    progress = (0, Position()) if start.found is None else (start.found[1].step, start.found[1].position)
    n_steps = last_step(config, loader, *progress)
    is_compiled = _decide_compiling(config, precision.device, run_flops(config, start.model.config, n_steps))
    model, module = place_model(config.train, start.model, world, precision, is_compiled=is_compiled)
    optimizers = build_optimizers(model, config.train)
    average = None if config.train.ema is None else WeightAverage(model, config.train.ema)
    scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.needs_scaler)
    settings: dict[str, Any] = {"config": config.model_dump(mode="json"), "total_steps": n_steps, **identity(data)}
    if start.found is None:
        state = TrainerState(**settings, lineage=start.lineage)
    else:
        state = replace(restore(start.found, folder, optimizers, scaler, average), **settings)
        refuse_past_schedule(start.found, n_steps)
    for line in config_warnings(config, loader, n_steps):
        log.warning(line)
    world.wait()
    run = Run(
        config=config,
        world=world,
        precision=precision,
        model=model,
        module=module,
        optimizers=optimizers,
        scaler=scaler,
        loader=loader,
        val_windows=None if data.val is None else cut_windows(config, data.val, data.tokenizer),
        tokenizer=data.tokenizer,
        folder=folder,
        log=None,
        total_steps=n_steps,
        lost_fraction=data.lost_fraction,
        full_model=start.model if world.is_main and is_sharded(model) else None,
        average=average,
    )
    return run, state


def _decide_compiling(config: RunConfig, device: torch.device, flops: float) -> bool:
    """Return whether to compile the model, and log why."""
    is_compiled, reason = decide_compiling(config.train.compile, device, flops)
    if reason is not None:
        log.info(reason)
    elif device.type == "cuda" and (missing := missing_to_compile(device)) is not None:
        log.warning(f"sine and loss are not fused on the GPU, which is slower; fusing needs {missing}")
    return is_compiled


def _write_description(folder: Path, config: RunConfig, lineage: dict[str, Any] | None, *, is_resumed: bool) -> None:
    """Write the configuration, the description of machine and code, and the model started from to the run folder."""
    if not has_same_config(folder / CONFIG_FILE, config):
        write_text(folder / CONFIG_FILE, to_yaml(config))
    former = (_read_system(folder) or {}) if is_resumed else None
    parent = {} if lineage is None else {"init_from": lineage}
    write_json(folder / SYSTEM_FILE, {**system_info(), CODE_KEY: code_of_run(former), **parent})


def _read_system(folder: Path) -> dict[str, Any] | None:
    """Return the ``system.json`` of the run that is resumed; None if it cannot be read."""
    try:
        return read_json(folder / SYSTEM_FILE)
    except Unreadable:
        return None


def _describe_run(run: Run) -> None:
    """Log the size of the run, and what it cannot do."""
    plan = plan_batches(run.config, run.world.size)
    steps = f"{run.total_steps:,} step{'' if run.total_steps == 1 else 's'}"
    ranks = f" on {run.world.size} ranks" if run.world.size > 1 else ""
    if is_sharded(run.model):
        mesh = plan_mesh(run.config.train, run.world.size, local_ranks())
        ranks += (
            ", sharded" if mesh.n_replicas == 1 else f", sharded over {mesh.n_shards} in {mesh.n_replicas} replicas"
        )
    log.info(
        f"{run.model.config.base}: {_n_parameters(run.model):,} parameters; {steps} of {plan.tokens_per_step:,} "
        f"tokens{ranks}; {describe_device(run.precision.device)}; {run.precision.reason}"
    )
    hindrance = _hindrance(run)
    if hindrance and run.sampler is not None and run.config.train.sample_prompts:
        log.warning(f"note: no samples with {hindrance}; psannlm generate samples from any checkpoint")


def _hindrance(run: Run) -> str | None:
    """Return the setting that prevents samples and task scores during training, or None."""
    return "device: mps" if run.precision.device.type == "mps" else None


def _validation_tasks(run: Run) -> ValidationTasks | None:
    """Return the tasks of ``train.eval_tasks``, on the rank that scores them; report where they cannot be scored."""
    names = run.config.train.eval_tasks
    if not names or run.tokenizer is None:
        return None
    if hindrance := _hindrance(run):
        log.warning(f"note: no task scores with {hindrance}; psannlm eval --tasks scores any checkpoint")
        return None
    if run.val_windows is None:
        log.warning("note: no task scores without validations; set data.val_split")
        return None
    return ValidationTasks(names, run.tokenizer, run.val_windows.store, run.model) if run.world.is_main else None


def _n_parameters(model: Transformer) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def _logging(run: Run, step: int) -> Iterator[None]:
    """Open the metrics log on rank 0, and the TensorBoard log if ``train.tensorboard`` is set."""
    if not run.world.is_main:
        yield
        return
    with closing(TensorBoardLog(run.folder, step)) if run.config.train.tensorboard else nullcontext() as board:
        run.log = MetricsLog(run.folder, step, None if board is None else board.write)
        yield


def _draw(run: Run) -> Path | None:
    """Draw the loss curve and return its path. If that fails, report it and return None: the run is still valid."""
    rows = read_metrics(run.folder) if run.world.is_main else []
    try:
        return draw_curve(run.folder, f"{run.folder.name}: {run.config.model.base}", rows) if rows else None
    except (PictureError, StorageError) as error:
        log.warning(f"note: no loss curve: {error}")
        return None

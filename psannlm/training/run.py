"""A configuration to a trained model on disk: builds every part, hands them to the loop, and sums up."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from psannlm.config.run import RunConfig, plan_batches, to_yaml
from psannlm.data.dataset import LMDataset
from psannlm.data.loader import Loader
from psannlm.data.prepare import PreparedData, load_corpus
from psannlm.data.stream import Stream
from psannlm.errors import Interrupted, PictureError, StorageError, TrainingError
from psannlm.io.atomic import explain_write_errors, remove_leftovers, write_text
from psannlm.io.lock import RunLock
from psannlm.io.run_metadata import system_info, write_json
from psannlm.kernels.compile import compiled
from psannlm.models.accounting import Place, refuse_oversize
from psannlm.models.artifact import load_model
from psannlm.models.registry import build_model, resolve
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import (
    Precision,
    describe_device,
    gpu_memory_bytes,
    missing_to_compile,
    pick_device,
    pick_precision,
    require_compiler,
)
from psannlm.runtime.distributed import World, joined, launched_world, local_ranks
from psannlm.runtime.signals import stopping_on_signals
from psannlm.tokenizers.base import MIN_VOCAB_SIZE, Tokenizer
from psannlm.tokenizers.roundtrip import is_lossy
from psannlm.training.callbacks import Callback
from psannlm.training.checkpoint import BEST, TrainerState, pointed, step_folder
from psannlm.training.compiling import decide_compiling, run_flops
from psannlm.training.loop import Progress, Run, Sampler, run_steps
from psannlm.training.metrics import MetricsLog, draw_curve, read_metrics
from psannlm.training.optim import OptimizerSet
from psannlm.training.parallel import gather_into, is_sharded, replicate, shard
from psannlm.training.progress import Reporter, SilentReporter, TimeBudget
from psannlm.training.result import TrainResult
from psannlm.training.resume import (
    find_state,
    identity,
    make_way,
    move_aside,
    preparation,
    refuse_other_data,
    refuse_past_schedule,
    restore,
    same_model,
)
from psannlm.training.run_folder import CONFIG_FILE, SYSTEM_FILE, refuse_foreign_files, says_the_same
from psannlm.training.tensorboard import TensorBoardLog, require_tensorboard


def train(
    config: RunConfig,
    *,
    resume: str = "auto",
    reporter: Reporter | None = None,
    data: PreparedData | None = None,
    model: Transformer | None = None,
    sampler: Sampler | None = None,
    time_budget_s: float | None = None,
    callbacks: Sequence[Callback] = (),
    ending: threading.Event | None = None,
) -> TrainResult:
    """Run the training that ``config`` describes and return what it came to.

    Args:
        resume: ``auto`` goes on from the newest whole checkpoint of the run folder when it belongs to the same
            configuration; ``never`` starts anew, after moving a run that is there aside; anything else is the path of
            a checkpoint to start from, whose ``train`` settings may differ from the configuration's.
        data: a corpus prepared already; None prepares ``config.data``.
        model: weights to start from (trained in place); None builds ``config.model``.
        sampler: continues ``train.sample_prompts`` at each validation; None leaves that out.
        time_budget_s: seconds from now after which the step in hand is finished and saved, and the run ends; the same
            call goes on with it. At least one step is made.
        callbacks: called on rank 0 after each step, validation and save, and at the end.
        ending: once it is set, the run ends as it does when a time budget is spent.

    Raises:
        ConfigError: the run folder holds a run of another configuration; the message lists the keys that differ.
        Interrupted: Ctrl-C or SIGTERM; the state was saved.
        PsannlmError: as the rooms that are called raise it.
    """
    budget = TimeBudget(time_budget_s)
    if config.train.tensorboard:
        require_tensorboard()
    world = launched_world(config.train.ddp, config.train.fsdp)
    device = pick_device(config.train.device, world.local_rank)
    precision = pick_precision(config.train.amp, device)
    if config.train.compile is True:
        require_compiler(device)
    place = place_of(config, world, device)
    if model is None:
        refuse_oversize(config.model, MIN_VOCAB_SIZE, place)
    if reporter is None or not world.is_main:
        reporter = SilentReporter()
    folder = Path(os.path.expanduser(config.train.checkpoint_dir))
    # The lock within the group, so that all ranks hear when it is refused.
    with joined(world, device), RunLock(folder) if world.is_main else nullcontext() as lock:
        if lock is not None:
            with explain_write_errors(folder):
                remove_leftovers(folder)
            if resume == "never":
                move_aside(lock, reporter)
            refuse_foreign_files(folder, config, config.train.max_steps)
        world.wait()
        start = _find_start(config, folder, resume, reporter, data, model, world, place)
        world.wait()
        run, progress = _build(config, start, world, precision, folder, reporter)
        run.sampler, run.budget, run.callbacks = sampler, budget, tuple(callbacks)
        run.ending = ending or run.ending
        if start.found is not None:
            if lock is not None:
                make_way(lock, start.found[0], progress.best, reporter)
            reporter.notice(f"going on from {start.found[0]}: step {progress.step} of {run.total_steps}")
        reporter.notice(_describe_run(run))
        if is_sharded(run.model) and sampler is not None and config.train.sample_prompts:
            reporter.notice("note: no samples with fsdp: full; psannlm generate writes them from any checkpoint")
        if world.is_main:
            _describe_to_disk(folder, config)
        began = time.monotonic()
        try:
            with (
                _logging(run, progress.step),
                _reporting(reporter, progress.step, run.total_steps),
                stopping_on_signals(run.stop),
            ):
                progress = run_steps(run, progress)
        except (Interrupted, TrainingError):
            # The curve helps to see what went wrong.
            _draw(folder, config, world, reporter)
            raise
        finally:
            # The wrapper must go while the process group stands: were it the last to hold the group, taking it apart
            # would wait, with the interpreter locked, for a thread that needs the interpreter.
            run.module = run.model
            gc.collect()
        if progress.step < run.total_steps:
            reason = "ended as asked" if run.ending.is_set() else "the time budget is spent"
            reporter.notice(
                f"{reason} after step {progress.step} of {run.total_steps}; saved in {folder}; the same command goes on"
            )
        curve = _draw(folder, config, world, reporter)
        if is_sharded(run.model):
            # Whole again where there is room for it: on rank 0, and where the caller had all the weights before.
            gather_into(start.model if world.is_main or model is not None else None, run.model)
        result = TrainResult(
            model=start.model.eval(),
            folder=folder,
            checkpoint=pointed(folder, BEST) or step_folder(folder, progress.step),
            curve=curve,
            steps=progress.step,
            total_steps=run.total_steps,
            epochs=progress.position.epoch + progress.position.window / len(run.loader.windows),
            tokens=progress.tokens,
            parameters=_size(start.model),
            skipped=progress.skipped,
            seconds=time.monotonic() - began,
            train_loss=float(progress.metrics.get("loss", float("nan"))),
            best=progress.best,
            val_overlap=start.data.val_overlap,
            lossy_tokenizer=is_lossy(start.data.lost_fraction),
        )
        if world.is_main:
            for callback in run.callbacks:
                callback.on_end(result)
        return result


def place_of(config: RunConfig, world: World, device: torch.device, n_local: int | None = None) -> Place:
    """Return where the model of a run is to be; ``n_local`` ranks share this machine, by default what torchrun says."""
    n_ranks = min(world.size, n_local or local_ranks())
    n_shards = world.size if config.train.fsdp == "full" else 1
    return Place(device.type, gpu_memory_bytes(device), n_ranks, n_shards)


@dataclass(frozen=True)
class _Start:
    """What a run begins with: the checkpoint it goes on from, if any, its data, and its weights."""

    found: tuple[Path, TrainerState] | None
    data: PreparedData
    model: Transformer


def _find_start(
    config: RunConfig,
    folder: Path,
    resume: str,
    reporter: Reporter,
    data: PreparedData | None,
    model: Transformer | None,
    world: World,
    place: Place,
) -> _Start:
    """Find the checkpoint, prepare the data and make the weights, each unless it is given.

    New weights that will be sharded are made on rank 0 alone: the others get their parts from there.
    """
    found = find_state(config, folder, resume, reporter)
    loaded = None if found is None else load_model(found[0])
    if data is None:
        tokenizer = None if loaded is None else loaded.tokenizer
        data = load_corpus(config.data, reporter.notice, tokenizer, preparation(found))
    if found is not None:
        refuse_other_data(found, data)
    vocab_size = data.tokenizer.vocab_size
    if loaded is not None:
        model = same_model(loaded.model, model)
    elif model is None:
        resolved = resolve(config.model, vocab_size=vocab_size, max_seq_len=config.data.max_length)
        refuse_oversize(resolved, vocab_size, place)
        is_elsewhere = config.train.fsdp == "full" and not world.is_main
        model = build_model(resolved, seed=config.train.seed, device="meta" if is_elsewhere else "cpu")
    else:
        resolve(model.config, vocab_size=vocab_size)  # refuses a model with fewer rows than ids
    return _Start(found, data, model)


def _build(
    config: RunConfig, start: _Start, world: World, precision: Precision, folder: Path, reporter: Reporter
) -> tuple[Run, Progress]:
    """Put the parts together, in the state they had at the checkpoint; nothing is written yet."""
    data, model = start.data, start.model
    model = shard(model, world, precision) if config.train.fsdp == "full" else model.to(precision.device)
    model.train().grad_checkpoint = config.train.grad_checkpoint
    loader = build_loader(config, data, world, pin_memory=precision.device.type == "cuda")
    optimizers = OptimizerSet(model, config.train.optimizer, config.train.weight_decay)
    scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.needs_scaler)
    progress = Progress() if start.found is None else restore(start.found, folder, optimizers, scaler)
    n_steps = steps_to_make(config, loader, progress)
    if start.found is not None:
        refuse_past_schedule(start.found, n_steps)
    for line in doubts(config, loader, n_steps):
        reporter.notice(line)
    is_compiled, reason = decide_compiling(
        config.train.compile, precision.device, run_flops(config, model.config, n_steps), is_sharded=is_sharded(model)
    )
    if reason is not None:
        reporter.notice(reason)
    elif precision.device.type == "cuda" and (missing := missing_to_compile(precision.device)) is not None:
        reporter.notice(f"sine and loss are not fused on the GPU, which would be faster: that needs {missing}")
    world.wait()
    run = Run(
        config=config,
        world=world,
        precision=precision,
        model=model,
        module=_prepared_module(model, world, precision.device, is_compiled=is_compiled),
        optimizers=optimizers,
        scaler=scaler,
        loader=loader,
        val_windows=None if data.val is None else cut_windows(config, data.val, data.tokenizer),
        tokenizer=data.tokenizer,
        folder=folder,
        log=None,
        reporter=reporter,
        total_steps=n_steps,
        identity=identity(data),
        lost_fraction=data.lost_fraction,
    )
    return run, progress


def steps_to_make(config: RunConfig, loader: Loader, progress: Progress) -> int:
    """Return the number of the last step of a run that stands at ``progress``.

    A run that goes on with another number of ranks makes larger or smaller steps: what is left of its epochs counts.
    """
    epochs_left = config.train.epochs - progress.position.epoch
    if config.train.max_steps is not None or epochs_left <= 0:
        return config.train.max_steps or progress.step
    windows_left = len(loader.windows) - progress.position.window
    this_epoch = -(-windows_left // loader.windows_per_step)
    return progress.step + this_epoch + (epochs_left - 1) * loader.steps_per_epoch


def doubts(config: RunConfig, loader: Loader, n_steps: int) -> list[str]:
    """Return, in lines for people, what was asked for and cannot come to pass with this corpus and this many steps."""
    found = []
    asked, there = loader.windows_per_step, len(loader.windows)
    if asked > there:
        found.append(
            f"note: a step asks for {asked:,} windows and the training text gives {there:,}: every step is the whole "
            "text; lower train.batch_tokens or train.grad_accum_steps for more steps"
        )
    if config.train.warmup_steps > n_steps:
        found.append(
            f"note: train.warmup_steps {config.train.warmup_steps} reaches past the last step, {n_steps}: the "
            f"learning rate never comes to train.lr {config.train.lr:g}; lower it, or train longer"
        )
    elif config.train.warmup_steps + config.train.cooldown_steps(n_steps) > n_steps:
        found.append(
            f"note: train.warmup_steps {config.train.warmup_steps} reaches into the cooldown, the "
            f"last {config.train.cooldown_steps(n_steps)} of {n_steps} steps; lower it or train.cooldown_share, or "
            "train longer"
        )
    return found


def cut_windows(config: RunConfig, store: Stream, tokenizer: Tokenizer) -> LMDataset:
    """Return the windows of ``store`` as ``config.data`` wants them: length and packing."""
    return LMDataset(store, config.data.max_length, pad_id=tokenizer.pad_id, pack=config.data.pack_sequences)


def build_loader(config: RunConfig, data: PreparedData, world: World, *, pin_memory: bool = False) -> Loader:
    """Return the loader of this rank's training windows; ``pin_memory`` as in ``Loader``."""
    plan = plan_batches(config, world.size)
    return Loader(
        cut_windows(config, data.train, data.tokenizer),
        plan.micro_batch_size,
        plan.grad_accum_steps,
        rank=world.rank,
        world_size=world.size,
        seed=config.train.seed,
        pin_memory=pin_memory,
    )


def _prepared_module(model: Transformer, world: World, device: torch.device, *, is_compiled: bool) -> nn.Module:
    if is_sharded(model):
        return model
    module: nn.Module = compiled(model) if is_compiled else model
    return replicate(module, world, device)


def _describe_to_disk(folder: Path, config: RunConfig) -> None:
    if not says_the_same(folder / CONFIG_FILE, config):
        write_text(folder / CONFIG_FILE, to_yaml(config))
    write_json(folder / SYSTEM_FILE, system_info())


def _describe_run(run: Run) -> str:
    plan = plan_batches(run.config, run.world.size)
    steps = f"{run.total_steps:,} step{'' if run.total_steps == 1 else 's'}"
    ranks = f" on {run.world.size} ranks" if run.world.size > 1 else ""
    if is_sharded(run.model):
        ranks += ", sharded"
    return (
        f"{run.model.config.base}: {_size(run.model):,} parameters; {steps} of {plan.tokens_per_step:,} tokens{ranks}; "
        f"{describe_device(run.precision.device)}; {run.precision.reason}"
    )


def _size(model: Transformer) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def _logging(run: Run, step: int) -> Iterator[None]:
    """Let the main rank log its metrics, to TensorBoard too where that is asked for."""
    if not run.world.is_main:
        yield
        return
    with closing(TensorBoardLog(run.folder, step)) if run.config.train.tensorboard else nullcontext() as board:
        run.log = MetricsLog(run.folder, step, None if board is None else board.write)
        yield


@contextmanager
def _reporting(reporter: Reporter, step: int, n_steps: int) -> Iterator[None]:
    reporter.start(step, n_steps)
    try:
        yield
    finally:
        reporter.stop()


def _draw(folder: Path, config: RunConfig, world: World, reporter: Reporter) -> Path | None:
    """Draw the loss curve. Where that fails, say so and return None: no picture decides how a training ends."""
    rows = read_metrics(folder) if world.is_main else []
    try:
        return draw_curve(folder, f"{folder.name}: {config.model.base}", rows) if rows else None
    except (PictureError, StorageError) as error:
        reporter.notice(f"note: no loss curve: {error}")
        return None

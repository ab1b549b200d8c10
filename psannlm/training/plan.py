"""Plan of a run before its first step: batches, number of steps, compile decision, memory and disk."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from psannlm.config.data import PathSource
from psannlm.config.files import may_be_prepared
from psannlm.config.model import ModelConfig
from psannlm.config.run import BatchPlan, RunConfig, plan_batches, plan_mesh, total_steps
from psannlm.data.dataset import LMDataset
from psannlm.data.loader import Loader, Position
from psannlm.data.mixture import Mixture
from psannlm.data.prepare import PreparedData, load_corpus
from psannlm.data.stream import Stream
from psannlm.data.windows import Windows
from psannlm.errors import ConfigError, Problem
from psannlm.io.atomic import free_bytes
from psannlm.kernels.compiler import compiler_fault, require_compiler
from psannlm.models.accounting import (
    Place,
    count_parameters,
    describe_oversize,
    flops_per_token,
    refuse_oversize,
    training_memory,
)
from psannlm.models.parallel_estimates import sharded_memory
from psannlm.models.registry import resolve
from psannlm.runtime.device import gpu_memory_bytes, pick_precision
from psannlm.runtime.distributed import World, local_ranks, world_from_env
from psannlm.runtime.progress import OnProgress, ignore_progress
from psannlm.tokenizers.base import MIN_VOCAB_SIZE, Tokenizer
from psannlm.training.initial import load_parent, refuse_other_tokenizer, with_parent_model

log = logging.getLogger(__name__)

# The memory estimate runs layer by layer; more layers than this would take long.
_MAX_LAYERS = 4096
# Floating-point operations of one rank from which torch.compile pays off: compiling took half a minute on two cores and
# saves 14 % of a step in float32 and 19 to 23 % in bf16 (docs/research/log.md, 2026-11-30). In that time a GPU computes
# a thousand times as much.
COMPILE_BREAK_EVEN_FLOPS = {"cpu": 1e14, "cuda": 1e17}


@dataclass(frozen=True)
class TrainingPlan:
    """Requirements of a run. ``memory`` is in bytes of one rank by part, ``checkpoint_bytes`` in bytes.

    ``config`` is the resolved configuration: the defaults of the base and of the corpus are filled in.
    """

    config: RunConfig
    parameters: dict[str, int]
    flops_per_token: int
    batches: BatchPlan
    n_windows: int
    steps_per_epoch: int
    n_steps: int
    precision: str
    memory: dict[str, int]
    checkpoint_bytes: int

    @property
    def n_parameters(self) -> int:
        """Total number of trainable parameters."""
        return sum(self.parameters.values())

    def as_dict(self) -> dict[str, Any]:
        """Return all values as plain data."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        tokens = {"tokens_per_step": self.batches.tokens_per_step, "n_parameters": self.n_parameters}
        config = self.config.model_dump(mode="json")
        return {**plain, "config": config, "batches": asdict(self.batches), **tokens}


def plan_training(
    config: RunConfig, n_ranks: int | None = None, *, on_progress: OnProgress = ignore_progress
) -> TrainingPlan:
    """Read and tokenize the corpus, without building weights or writing files; return the :class:`TrainingPlan`.

    Args:
        n_ranks: number of processes to plan for; None: those that torchrun started, or this one.
        on_progress: gets the bytes copied of a prepared folder at a URL.

    Raises:
        PsannlmError: any error that would stop the run before its first step.
    """
    config = with_parent_model(config)
    if n_ranks is None:
        world = world_from_env(config.train.ddp, config.train.fsdp)
    else:
        world = World(size=n_ranks)
    device = world.pick_device(config.train.device)
    precision = pick_precision(config.train.amp, device)
    if config.train.compile is True:
        require_compiler(device)
    place = place_of(config, world, device, n_ranks)
    batches = plan_batches(config, world.size)
    if config.model.n_layers > _MAX_LAYERS:
        refuse_oversize(config.model, MIN_VOCAB_SIZE, place)
    parent = None if config.train.init_from is None else load_parent(config)
    data = load_corpus(config.data, None if parent is None else parent.tokenizer, on_progress=on_progress)
    refuse_validation_without_data(config, data)
    if parent is not None:
        refuse_other_tokenizer(parent, data)
    model = resolve(config.model, vocab_size=data.tokenizer.vocab_size, max_seq_len=config.data.max_length)
    if (oversize := describe_oversize(model, place)) is not None:
        log.warning(f"note: {oversize}")
    loader = build_loader(config, data, world)
    n_steps = total_steps(config, loader.steps_per_epoch)
    for line in config_warnings(config, loader, n_steps):
        log.warning(line)
    flops = run_flops(config, model, n_steps)
    _, reason = decide_compiling(config.train.compile, device, flops)
    if reason is not None:
        log.info(reason)
    memory = training_memory(
        model,
        batches.micro_batch_size,
        batches.seq_len,
        dtype=precision.dtype,
        optimizer=config.train.optimizer,
        grad_checkpoint=config.train.grad_checkpoint,
        device_type=device.type,
        ema=config.train.ema is not None,
    )
    checkpoint_bytes = memory.weights + memory.optimizer + memory.average
    for line in _disk_warnings(config, checkpoint_bytes):
        log.warning(line)
    if config.train.is_sharded:
        memory = sharded_memory(
            memory,
            model,
            place.n_shards,
            dtype=precision.dtype,
            grad_accum_steps=batches.grad_accum_steps,
            grad_sync=config.train.grad_sync,
            grad_checkpoint=config.train.grad_checkpoint,
        )
    return TrainingPlan(
        config=config.model_copy(update={"model": model}),
        parameters=count_parameters(model),
        flops_per_token=flops_per_token(model, batches.seq_len),
        batches=batches,
        n_windows=len(loader.windows),
        steps_per_epoch=loader.steps_per_epoch,
        n_steps=n_steps,
        precision=precision.reason,
        memory={**asdict(memory), "total": memory.total},
        checkpoint_bytes=checkpoint_bytes,
    )


def refuse_validation_without_data(config: RunConfig, data: PreparedData) -> None:
    """Raise ConfigError if validations are asked for and a corpus at a URL has nothing held out.

    Of other corpora the configuration alone decides, before anything is read.
    """
    urls = [source.path for source in config.data.sources if isinstance(source, PathSource)]
    if config.train.eval_interval_steps is not None and data.val is None and any(map(may_be_prepared, urls)):
        message = (
            f"asks for a validation every {config.train.eval_interval_steps} steps, but {urls[0]} has nothing held "
            "out; set data.val_split for text, prepare it with psannlm prep --val-split, or drop this key "
            "(--set train.eval_interval_steps=null)"
        )
        raise ConfigError(Problem("train.eval_interval_steps", message))


def _disk_warnings(config: RunConfig, checkpoint_bytes: int) -> list[str]:
    """Return a message if the disk is too small for the kept checkpoints, the best one and the one being written."""
    folder = config.train.checkpoint_dir
    needed, free = (config.train.keep_checkpoints + 2) * checkpoint_bytes, free_bytes(Path(folder).expanduser())
    if free >= needed:
        return []
    return [
        f"note: checkpoints will need {needed / 1e6:,.1f} MB and {folder} has {free / 1e6:,.1f} MB free; free some, "
        "choose another train.checkpoint_dir, or lower train.keep_checkpoints"
    ]


def place_of(config: RunConfig, world: World, device: torch.device, n_local: int | None = None) -> Place:
    """Return the device memory that a run's model must fit into.

    Args:
        n_local: ranks on this machine; None: as the launcher set it.

    Raises:
        ConfigError: ``train.shard_size`` does not divide the ranks, or is needed and null.
    """
    n_ranks = min(world.size, n_local or local_ranks())
    return Place(device.type, gpu_memory_bytes(device), n_ranks, plan_mesh(config.train, world.size, n_ranks).n_shards)


def last_step(config: RunConfig, loader: Loader, step: int, position: Position) -> int:
    """Return the number of the last step of a run that is at ``position`` after ``step`` steps.

    A run that resumes with another number of ranks makes larger or smaller steps, so the remaining windows are counted.
    """
    epochs_left = config.train.epochs - position.epoch
    if config.train.max_steps is not None or epochs_left <= 0:
        return config.train.max_steps or step
    windows_left = len(loader.windows) - position.window
    this_epoch = -(-windows_left // loader.windows_per_step)
    return step + this_epoch + (epochs_left - 1) * loader.steps_per_epoch


def config_warnings(config: RunConfig, loader: Loader, n_steps: int) -> list[str]:
    """Return a message for each setting that cannot take effect with this corpus and ``n_steps`` steps."""
    found = [] if (line := describe_mixture(config, loader)) is None else [line]
    asked, there = loader.windows_per_step, len(loader.windows)
    if asked > there:
        found.append(
            f"note: a step takes {asked:,} windows, and the training text has {there:,}: every step is the whole "
            "text; lower train.batch_tokens or train.grad_accum_steps for more steps"
        )
    if config.train.warmup_steps > n_steps:
        found.append(
            f"note: train.warmup_steps {config.train.warmup_steps} reaches past the last step, {n_steps}: the "
            f"learning rate never reaches train.lr {config.train.lr:g}; lower it, or train longer"
        )
    elif config.train.warmup_steps + config.train.cooldown_steps(n_steps) > n_steps:
        found.append(
            f"note: train.warmup_steps {config.train.warmup_steps} reaches into the cooldown, the "
            f"last {config.train.cooldown_steps(n_steps)} of {n_steps} steps; lower it or train.cooldown_share, or "
            "train longer"
        )
    return found


def cut_windows(config: RunConfig, store: Stream, tokenizer: Tokenizer) -> LMDataset:
    """Return the windows of ``store`` with the length, packing and isolation of ``config.data``."""
    return LMDataset(
        store,
        config.data.max_length,
        pad_id=tokenizer.pad_id,
        pack=config.data.pack_sequences,
        isolate_documents=config.data.isolate_documents,
    )


def build_loader(config: RunConfig, data: PreparedData, world: World, *, pin_memory: bool = False) -> Loader:
    """Return the loader of this rank's training windows; ``pin_memory`` as for ``Loader``."""
    plan = plan_batches(config, world.size)
    windows = cut_windows(config, data.train, data.tokenizer)
    return Loader(
        windows,
        plan.micro_batch_size,
        plan.grad_accum_steps,
        rank=world.rank,
        world_size=world.size,
        seed=config.train.seed,
        pin_memory=pin_memory,
        mixture=build_mixture(config, data, windows),
    )


def build_mixture(config: RunConfig, data: PreparedData, windows: Windows) -> Mixture | None:
    """Return the mixture that the weights of ``data.sources`` ask for; None where they have none.

    Raises:
        ConfigError: a source has no training window, or too small a weight.
    """
    weights = [source.weight for source in config.data.sources if source.weight is not None]
    return Mixture.of(windows, data.first_documents, weights) if weights else None


def describe_mixture(config: RunConfig, loader: Loader) -> str | None:
    """Return a message with each source's share of an epoch and its passes per epoch; None without weights."""
    if loader.mixture is None:
        return None
    total = len(loader.windows)
    parts = [
        f"{source.path if isinstance(source, PathSource) else source.builtin} {n / total:.1%} ({repeats:.2f} passes)"
        for source, n, repeats in zip(config.data.sources, loader.mixture.counts, loader.mixture.repeats, strict=True)
    ]
    return f"sources of each epoch: {', '.join(parts)}"


def run_flops(config: RunConfig, model: ModelConfig, n_steps: int) -> float:
    """Return the floating-point operations of one rank in ``n_steps``; ``model`` is resolved."""
    of_one_rank = plan_batches(config, 1)
    return float(flops_per_token(model, of_one_rank.seq_len)) * of_one_rank.tokens_per_step * n_steps


def decide_compiling(setting: bool | Literal["auto"], device: torch.device, flops: float) -> tuple[bool, str | None]:
    """Return whether to compile the model, and for ``auto`` a message with the reason.

    The size of the run decides, not a clock: an interrupted run must decide the same when it resumes, because a
    compiled model rounds differently.

    Args:
        setting: ``train.compile``.
        flops: floating-point operations of the whole run on this rank.

    Raises:
        DeviceError: ``setting`` is true, and no compiler works.
    """
    if setting != "auto":
        if setting:
            require_compiler(device)
        return setting, None
    needed = COMPILE_BREAK_EVEN_FLOPS.get(device.type, float("inf"))
    if flops < needed:
        return False, None
    missing = compiler_fault(device)
    if missing is not None:
        return False, f"compile: auto would pay off over {flops:.2g} operations, but needs {missing}: uncompiled"
    return True, f"compile: auto compiles the model: it pays off over {flops:.2g} operations (from {needed:.0e})"

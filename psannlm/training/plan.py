"""A configuration to what a run will need: parameters, operations, steps, memory and disk, before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from psannlm.config.run import BatchPlan, RunConfig, plan_batches, total_steps
from psannlm.data.prepare import load_corpus
from psannlm.io.atomic import free_bytes
from psannlm.models.accounting import (
    count_parameters,
    describe_oversize,
    flops_per_token,
    refuse_oversize,
    training_memory,
)
from psannlm.models.parallel_estimates import sharded_memory
from psannlm.models.registry import resolve
from psannlm.runtime.device import pick_device, pick_precision, require_compiler
from psannlm.runtime.distributed import World, launched_world
from psannlm.tokenizers.base import MIN_VOCAB_SIZE
from psannlm.training.compiling import decide_compiling, run_flops
from psannlm.training.run import build_loader, doubts, place_of

# Activations are counted layer by layer, which takes long for more layers than this.
_MOST_LAYERS = 4096


@dataclass(frozen=True)
class TrainingPlan:
    """What a run will need. ``memory`` and ``checkpoint_bytes`` are in bytes, ``memory`` on one rank by part.

    ``config`` is the configuration with everything that it left to the base and to the corpus filled in.
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
        """Learnable parameters in all."""
        return sum(self.parameters.values())

    def as_dict(self) -> dict[str, Any]:
        """Return every figure as plain data."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        tokens = {"tokens_per_step": self.batches.tokens_per_step, "n_parameters": self.n_parameters}
        config = self.config.model_dump(mode="json")
        return {**plain, "config": config, "batches": asdict(self.batches), **tokens}


def plan_training(config: RunConfig, notice: Callable[[str], None], n_ranks: int | None = None) -> TrainingPlan:
    """Read and tokenize the corpus, but build no weights and write nothing; return the :class:`TrainingPlan`.

    ``n_ranks`` plans for so many processes; None for those that torchrun has started, or for this one.

    Raises:
        PsannlmError: whatever would stop the run before its first step.
    """
    if n_ranks is None:
        world = launched_world(config.train.ddp, config.train.fsdp)
    else:
        world = World(size=n_ranks)
    device = pick_device(config.train.device, world.local_rank)
    precision = pick_precision(config.train.amp, device)
    if config.train.compile is True:
        require_compiler(device)
    place = place_of(config, world, device, n_ranks)
    if config.model.n_layers > _MOST_LAYERS:
        refuse_oversize(config.model, MIN_VOCAB_SIZE, place)
    data = load_corpus(config.data, notice)
    model = resolve(config.model, vocab_size=data.tokenizer.vocab_size, max_seq_len=config.data.max_length)
    if (oversize := describe_oversize(model, place)) is not None:
        notice(f"note: {oversize}")
    loader = build_loader(config, data, world)
    n_steps = total_steps(config, loader.steps_per_epoch)
    for line in doubts(config, loader, n_steps):
        notice(line)
    flops = run_flops(config, model, n_steps)
    _, reason = decide_compiling(config.train.compile, device, flops, is_sharded=config.train.fsdp == "full")
    if reason is not None:
        notice(reason)
    batches = plan_batches(config, world.size)
    memory = training_memory(
        model,
        batches.micro_batch_size,
        batches.seq_len,
        dtype=precision.dtype,
        optimizer=config.train.optimizer,
        grad_checkpoint=config.train.grad_checkpoint,
        device_type=device.type,
    )
    checkpoint_bytes = memory.weights + memory.optimizer
    for line in _doubts_of_disk(config, checkpoint_bytes):
        notice(line)
    if config.train.fsdp == "full":
        memory = sharded_memory(
            memory,
            model,
            world.size,
            dtype=precision.dtype,
            grad_accum_steps=config.train.grad_accum_steps,
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


def _doubts_of_disk(config: RunConfig, checkpoint_bytes: int) -> list[str]:
    """Return a note where the disk has no room for the checkpoints kept, the best one and the one being written."""
    folder = config.train.checkpoint_dir
    needed, free = (config.train.keep_checkpoints + 2) * checkpoint_bytes, free_bytes(Path(folder).expanduser())
    if free >= needed:
        return []
    return [
        f"note: checkpoints will need {needed / 1e6:,.1f} MB and {folder} has {free / 1e6:,.1f} MB free; free some, "
        "choose another train.checkpoint_dir, or lower train.keep_checkpoints"
    ]

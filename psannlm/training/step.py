"""One optimiser step: gradient accumulation over micro-batches and ranks, clipping, update, and its metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from psannlm.data.loader import MicroBatch
from psannlm.runtime.device import AsyncReadback, Precision, sum_dtype
from psannlm.runtime.distributed import World
from psannlm.training.optim import OptimizerSet
from psannlm.training.parallel import all_reduce_replicated_grads, clip_gradients, gradient_sync


class StepResult:
    """Metrics of a step over all ranks: mean loss in nats per label, gradient norm before clipping, number of labels.

    Reading the first of them waits until the device has computed this step, but not for later work.
    """

    def __init__(self, metrics: AsyncReadback, is_finding_scale: bool = False) -> None:
        """Wrap ``metrics``: summed loss, number of labels, gradient norm.

        Args:
            is_finding_scale: the fp16 scale is above 1, so that overflowing gradients lower it.
        """
        self._metrics, self._is_finding_scale = metrics, is_finding_scale

    @cached_property
    def _read(self) -> tuple[float, float, float]:
        total, n_labels, grad_norm = self._metrics.read()
        return total, n_labels, grad_norm

    @property
    def loss(self) -> float:
        """Mean loss in nats per label."""
        return self._read[0] / max(1, self.n_labels)

    @property
    def n_labels(self) -> int:
        """Number of labels of all ranks, ignored ones left out."""
        return int(self._read[1])

    @property
    def grad_norm(self) -> float:
        """Norm of all gradients before clipping."""
        return self._read[2]

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def may_continue(self) -> bool:
        """Whether the step is finite, or is an fp16 step whose gradients overflowed while the scale is being found.

        Such a step is skipped, the scale is halved, and training continues.
        """
        return self.is_finite or (math.isfinite(self.loss) and self._is_finding_scale)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step on one rank, so that dropout needs no generator state in a checkpoint."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def train_step(
    model: nn.Module,
    micro_batches: Sequence[MicroBatch],
    optimizers: OptimizerSet,
    *,
    precision: Precision,
    scaler: torch.amp.GradScaler,
    lr: float,
    grad_clip: float | None = 1.0,
    label_smoothing: float = 0.0,
    sync_once: bool = True,
    world: World | None = None,
    sync_before_update: bool = True,
) -> StepResult:
    """Run one optimiser step on the mean loss over all labels of all micro-batches of all ranks.

    Every label has the same weight, so that four micro-batches equal one large one, ragged or not.
    ``model(input_ids, labels, label_smoothing)`` returns a *summed* loss; where a batch has ``document_positions``,
    they are a fourth argument.

    Args:
        sync_once: ranks exchange gradients after the last micro-batch only.
        sync_before_update: wait for the device and check loss and gradients before the update, so that a non-finite
            step changes no parameter. Always so under fp16. If false, nothing waits for the device, and a non-finite
            step has already changed the parameters when its result is read.
    """
    world = world or World()
    device = precision.device
    n_labels = torch.full((), sum(batch.n_labels for batch in micro_batches), dtype=sum_dtype(device), device=device)
    n_labels = world.all_reduce_(n_labels)
    # Data parallelism averages gradients over the ranks: times world.size gives the sum.
    weight = (world.size / n_labels.clamp(min=1)).float()
    optimizers.set_lr(lr)
    optimizers.zero_grad()
    total = torch.zeros((), device=device)
    for index, batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        inputs, labels, *positions = (
            tensor.to(device, non_blocking=device.type == "cuda")
            for tensor in (batch.input_ids, batch.labels, batch.document_positions)
            if tensor is not None
        )
        with gradient_sync(model, is_last or not sync_once, is_last=is_last), precision.autocast():
            loss: Tensor = model(inputs, labels, label_smoothing, *positions)
            total += loss.detach()
            torch.autograd.backward(scaler.scale(loss * weight))
    all_reduce_replicated_grads(model, world)
    for optimizer in optimizers.optimizers:
        scaler.unscale_(optimizer)
    grad_norm = clip_gradients(model, grad_clip)
    metrics = AsyncReadback(
        torch.stack([world.all_reduce_(total.to(n_labels.dtype)), n_labels, grad_norm.to(n_labels.dtype)])
    )
    if not scaler.is_enabled():
        result = StepResult(metrics)
        if not sync_before_update or result.is_finite:
            for optimizer in optimizers.optimizers:
                optimizer.step()
        return result
    # Clipping by a non-finite norm makes every gradient NaN, also those of an optimiser without an overflow, which the
    # scaler would let step. Therefore no optimiser steps.
    result = StepResult(metrics, is_finding_scale=scaler.get_scale() > 1.0)
    if result.is_finite:
        for optimizer in optimizers.optimizers:
            scaler.step(optimizer)
    # If the step failed for another reason than the scale, keep the scale; update() also resets the overflow flags.
    scaler.update(None if result.may_continue else scaler.get_scale())
    return result

"""One optimiser step: micro-batches in, updated parameters and the step's loss out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from psannlm.data.loader import MicroBatch
from psannlm.device import Precision
from psannlm.distributed import World
from psannlm.training.optim import OptimizerSet
from psannlm.training.parallel import clip_gradients, gradient_sync, settle_gradients


@dataclass(frozen=True)
class StepResult:
    """Mean loss in nats per label over all ranks, gradient norm before clipping, and how many labels counted.

    ``is_finite`` is false where loss or gradients were not; the parameters were left alone then. Under fp16, gradients
    that overflow at a scale above 1 are part of finding the scale: the step is skipped, and ``is_finite`` is true.
    """

    loss: float
    grad_norm: float
    n_labels: int
    is_finite: bool


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step on one rank: dropout depends on nothing that a checkpoint would have to keep."""
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
) -> StepResult:
    """Make one step on the mean loss over all labels of all micro-batches of all ranks.

    Every label weighs the same wherever it stands, so that four micro-batches equal one large one, ragged or not.
    ``model(input_ids, labels, label_smoothing)`` returns a *summed* loss. With ``sync_once`` ranks exchange gradients
    after the last micro-batch only.
    """
    world = world or World()
    device = precision.device
    n_labels = int(world.sum(sum(batch.n_labels for batch in micro_batches), device))
    # Data parallelism averages gradients over ranks; the sum over ranks is wanted.
    weight = world.size / max(1, n_labels)
    optimizers.set_lr(lr)
    optimizers.zero_grad()
    total = torch.zeros((), device=device)
    for index, batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        with gradient_sync(model, is_last or not sync_once), precision.autocast():
            loss: Tensor = model(
                batch.input_ids.to(device, non_blocking=True),
                batch.labels.to(device, non_blocking=True),
                label_smoothing,
            )
            total += loss.detach()
            torch.autograd.backward(scaler.scale(loss * weight))
    settle_gradients(model, world)
    for optimizer in optimizers.optimizers:
        scaler.unscale_(optimizer)
    grad_norm = clip_gradients(model, grad_clip)
    mean_loss = world.sum(float(total), device) / max(1, n_labels)
    # Clipping by a norm that is not finite spoils every gradient, also those of an optimiser that saw no overflow and
    # that the scaler would let step: none steps then.
    if math.isfinite(grad_norm) and math.isfinite(mean_loss):
        for optimizer in optimizers.optimizers:
            scaler.step(optimizer)
    is_finding_scale = scaler.is_enabled() and scaler.get_scale() > 1.0
    is_finite = math.isfinite(mean_loss) and (math.isfinite(grad_norm) or is_finding_scale)
    if is_finite:
        scaler.update()
    elif scaler.is_enabled():
        # Nothing steps, and the scale stays; told of it, the scaler forgets what it found in these gradients.
        scaler.update(scaler.get_scale())
    return StepResult(mean_loss, grad_norm, n_labels, is_finite)

"""One optimiser step: micro-batches in, updated parameters and the step's loss out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from psannlm.data.loader import MicroBatch
from psannlm.runtime.device import Precision, Unread
from psannlm.runtime.distributed import World
from psannlm.training.optim import OptimizerSet
from psannlm.training.parallel import clip_gradients, gradient_sync, settle_gradients


class StepResult:
    """Mean loss in nats per label over all ranks, gradient norm before clipping, and how many labels counted.

    ``is_finite`` is false where loss or gradients were not. Under fp16, gradients that overflow at a scale above 1 are
    part of finding the scale: the step is skipped, and ``is_finite`` is true.

    The first look at any of these waits until the device has worked them out, and not for what it was given since.
    """

    def __init__(self, figures: Unread, is_finding_scale: bool = False) -> None:
        """``figures`` are the summed loss, the number of labels and the norm; an overflow may be part of the search."""
        self._figures, self._is_finding_scale = figures, is_finding_scale

    @cached_property
    def _read(self) -> tuple[float, float, float]:
        total, n_labels, grad_norm = self._figures.read()
        return total, n_labels, grad_norm

    @property
    def loss(self) -> float:
        """Mean loss in nats per label."""
        return self._read[0] / max(1, self.n_labels)

    @property
    def n_labels(self) -> int:
        """Labels of all ranks that counted."""
        return int(self._read[1])

    @property
    def grad_norm(self) -> float:
        """Norm of all gradients before clipping."""
        return self._read[2]

    @property
    def is_made(self) -> bool:
        """Whether loss and gradients were finite, so that a step along them is one."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def is_finite(self) -> bool:
        """Whether the run may go on as if nothing had happened."""
        return self.is_made or (math.isfinite(self.loss) and self._is_finding_scale)


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
    looks_first: bool = True,
) -> StepResult:
    """Make one step on the mean loss over all labels of all micro-batches of all ranks.

    Every label weighs the same wherever it stands, so that four micro-batches equal one large one, ragged or not.
    ``model(input_ids, labels, label_smoothing)`` returns a *summed* loss. With ``sync_once`` ranks exchange gradients
    after the last micro-batch only.

    With ``looks_first``, and always under fp16, a loss or gradient that is not finite touches no parameter: the
    optimisers step after a look at both, which waits for the device. Without, the device is given the whole step and
    not waited for; what is not finite has gone into the parameters by the time that the result tells of it.
    """
    world = world or World()
    device = precision.device
    n_labels = torch.full((), sum(batch.n_labels for batch in micro_batches), dtype=torch.float64, device=device)
    n_labels = world.total(n_labels)
    # Data parallelism averages gradients over ranks; the sum over ranks is wanted.
    weight = (world.size / n_labels.clamp(min=1)).float()
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
    figures = Unread(torch.stack([world.total(total.double()), n_labels, grad_norm.double()]))
    if not scaler.is_enabled():
        result = StepResult(figures)
        if not looks_first or result.is_made:
            for optimizer in optimizers.optimizers:
                optimizer.step()
        return result
    # Clipping by a norm that is not finite spoils every gradient, also those of an optimiser that saw no overflow and
    # that the scaler would let step: none steps then.
    result = StepResult(figures, is_finding_scale=scaler.get_scale() > 1.0)
    if result.is_made:
        for optimizer in optimizers.optimizers:
            scaler.step(optimizer)
    # Where nothing steps and the scale is not to blame, it stays; told of it, the scaler forgets what it found.
    scaler.update(None if result.is_finite else scaler.get_scale())
    return result

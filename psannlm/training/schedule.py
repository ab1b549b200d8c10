"""Learning rate schedules: linear warm-up, then cosine, constant, or warm-up-stable-decay (wsd)."""

from __future__ import annotations

import math
from typing import Literal

from psannlm.errors import TrainingError


def learning_rate(
    step: int,
    *,
    peak: float,
    min_lr: float,
    warmup_steps: int,
    total_steps: int,
    schedule: Literal["cosine", "wsd", "constant"] = "cosine",
    cooldown_steps: int = 0,
) -> float:
    """Return the learning rate of optimiser step ``step``, counted from 1 to ``total_steps``.

    1. Warm-up is linear: step 1 has 1/warmup_steps of the peak, step ``warmup_steps`` the peak.
    2. After the last step it stays at ``min_lr`` (at the peak, for a constant schedule).
    3. In between, it follows half a cosine from the peak to ``min_lr`` (Loshchilov and Hutter 2016, arXiv 1608.03983,
       without restarts), or stays at the peak, or, under ``wsd``, stays there until the last ``cooldown_steps`` and
       falls as 1 - sqrt(fraction of the cooldown) (Haegele et al. 2024, arXiv 2405.18392). It reaches ``min_lr`` one
       step past the last: with a ``min_lr`` of zero the last step would otherwise change nothing.

    Raises:
        TrainingError: under ``wsd``, ``step`` is past the last: training cannot continue after the cooldown.
    """
    if schedule == "wsd" and step > total_steps:
        raise TrainingError(f"step {step} is past the end of the schedule, {total_steps}; raise train.max_steps")
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    if step > total_steps:
        return min_lr
    if schedule == "wsd":
        cooled = max(0, step - (total_steps - cooldown_steps))
        return min_lr + (peak - min_lr) * (1.0 - math.sqrt(cooled / (cooldown_steps + 1)))
    progress = (step - warmup_steps) / (total_steps + 1 - warmup_steps)
    return min_lr + (peak - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))

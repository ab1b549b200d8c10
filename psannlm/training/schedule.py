"""Step number to learning rate: a pure function."""

from __future__ import annotations

import math
from typing import Literal

from psannlm.errors import TrainingError


def learning_rate(
    step: int,
    *,
    peak: float,
    floor: float,
    warmup_steps: int,
    total_steps: int,
    schedule: Literal["cosine", "wsd", "constant"] = "cosine",
    cooldown_steps: int = 0,
) -> float:
    """Return the learning rate of optimiser step ``step``, counted from 1 to ``total_steps``.

    1. During warm-up it rises in a line: step 1 has 1/warmup_steps of the peak, step ``warmup_steps`` the peak.
    2. After the last step it stays at the floor (at the peak, for a constant schedule).
    3. In between, it falls along half a cosine from the peak to the floor (Loshchilov and Hutter 2016, arXiv
       1608.03983, without restarts), or stays at the peak, or, under ``wsd``, stays there until the last
       ``cooldown_steps`` and falls as 1 - sqrt(share of the cooldown) (Haegele et al. 2024, arXiv 2405.18392). The
       floor lies one step past the last: were it zero, the last step would learn nothing.

    Raises:
        TrainingError: under ``wsd``, a step past the last: a rate that has come down is of no use to go on with.
    """
    if schedule == "wsd" and step > total_steps:
        raise TrainingError(f"step {step} is past the end of the schedule, {total_steps}; raise train.max_steps")
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    if step > total_steps:
        return floor
    if schedule == "wsd":
        cooled = max(0, step - (total_steps - cooldown_steps))
        return floor + (peak - floor) * (1.0 - math.sqrt(cooled / (cooldown_steps + 1)))
    progress = (step - warmup_steps) / (total_steps + 1 - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))

"""Step number to learning rate: a pure function."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    peak: float,
    floor: float,
    warmup_steps: int,
    total_steps: int,
    schedule: Literal["cosine", "constant"] = "cosine",
) -> float:
    """Return the learning rate of optimiser step ``step``, counted from 1 to ``total_steps``.

    1. During warm-up it rises in a line: step 1 has 1/warmup_steps of the peak, step ``warmup_steps`` the peak.
    2. After the last step it stays at the floor (at the peak, for a constant schedule).
    3. In between, it falls along half a cosine from the peak to the floor (Loshchilov and Hutter 2016, arXiv
       1608.03983, without restarts), or stays at the peak. The floor lies one step past the last: were it zero, the
       last step would learn nothing.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    if step > total_steps:
        return floor
    progress = (step - warmup_steps) / (total_steps + 1 - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))

"""A seed enters, an order of n things leaves, the same on every machine and with every release of numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def shuffled(n: int, seed: int, purpose: str, index: int = 0) -> NDArray[np.int64]:
    """Return a permutation of ``range(n)``, (n,) int64: a pure function of the arguments.

    ``purpose`` keeps draws with one seed apart (the split from the epochs), ``index`` numbers draws of one purpose.
    Random keys are sorted, rather than ``Generator.permutation`` called: numpy promises that the raw stream of a bit
    generator never changes, and makes no such promise for the methods of ``Generator``.
    """
    entropy = [seed, index, int.from_bytes(purpose.encode("utf-8"), "little")]
    keys = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(n)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)

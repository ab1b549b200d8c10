"""What a pass tells the compiler that plain tensor algebra cannot."""

from __future__ import annotations

import torch
from torch import Tensor


def stored(x: Tensor) -> Tensor:
    """Return ``x`` as a compiled pass finds it in memory: worked out once, and not anew wherever it is read.

    Outside a compiler that is ``x`` itself. The operator is the compiler's own, made to test just that; it has no
    public one. Whoever compiles has to import ``torch._inductor.test_operators``.
    """
    if not torch.compiler.is_compiling():
        return x
    kept: Tensor = torch.ops._inductor_test.realize(x)
    return kept

"""When to hand tensor algebra to the compiler, and what to tell it that the algebra cannot."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from psannlm.runtime.device import has_compiler, trial_failure

_Compiled = TypeVar("_Compiled", bound=Callable[..., Any])


def compiled(function: _Compiled, **settings: Any) -> _Compiled:
    """Return ``function`` or module put through torch.compile with ``settings``, by which :func:`realize` is obeyed."""
    # Takes a second to import, and holds the operator that `realize` puts there.
    import torch._inductor.test_operators

    return cast(_Compiled, torch.compile(function, **settings))


def use_compiled_kernels(x: Tensor) -> bool:
    """Whether algebra on ``x`` that reads and writes much is to be compiled also where the model is not: on a GPU."""
    return x.is_cuda and _gpus_compile()


@lru_cache(maxsize=1)
def _gpus_compile() -> bool:
    return has_compiler(torch.device("cuda")) and trial_failure("cuda") is None


def realize(x: Tensor) -> Tensor:
    """Return ``x`` as a compiled pass finds it in memory: worked out once, and not anew wherever it is read.

    Outside a compiler that is ``x`` itself. The operator is the compiler's own, made to test just that; it has no
    public one. :func:`compiled` knows it.
    """
    if not torch.compiler.is_compiling():
        return x
    kept: Tensor = torch.ops._inductor_test.realize(x)
    return kept

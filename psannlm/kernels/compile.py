"""When to use torch.compile for a formula, and how to keep the compiler from recomputing an intermediate."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from psannlm.kernels.compiler import has_compiler, trial_failure
from psannlm.kernels.torch_private import load_realize, realized

_Compiled = TypeVar("_Compiled", bound=Callable[..., Any])


def compiled(function: _Compiled, **settings: Any) -> _Compiled:
    """Return ``function`` or module compiled by torch.compile with ``settings``; it may call :func:`realize`."""
    # Imported here, in front of the first trace: `realize` may be met in any function.
    load_realize()
    return cast(_Compiled, torch.compile(function, **settings))


def use_compiled_kernels(x: Tensor) -> bool:
    """Whether memory-bound formulas on ``x`` are compiled even in an uncompiled model: on a GPU with a compiler."""
    return x.is_cuda and _gpus_compile()


@lru_cache(maxsize=1)
def _gpus_compile() -> bool:
    # A trial compilation, once per process: a broken compiler must not stop an uncompiled run.
    return has_compiler(torch.device("cuda")) and trial_failure("cuda") is None


def realize(x: Tensor) -> Tensor:
    """Return ``x``; in a compiled function, compute it once and store it instead of recomputing it at each use.

    Inductor inlines an intermediate into every kernel that reads it. Where many outputs read one expensive value, such
    as a rotated query or a normalised input, that repeats its sines or exponentials for each output.
    """
    # Uncompiled code stores every intermediate anyway.
    if not torch.compiler.is_compiling():
        return x
    return realized(x)

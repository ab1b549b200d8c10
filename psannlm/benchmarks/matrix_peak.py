"""A device and a dtype in; the rate at which it multiplies large matrices, the ceiling over a training step, out."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from psannlm.benchmarks.timing import Clock, Count
from psannlm.kernels.onednn import has_onednn, onednn_matmul

# Edge of the square matrices: large enough for full speed, and done in a fraction of a second.
_EDGE = {"cpu": 1536, "cuda": 8192}
_PASSES = 4


def matrix_peak(
    device: torch.device, dtype: torch.dtype, *, edge: int | None = None, clock: Clock = time.perf_counter
) -> Callable[[Count], float]:
    """Return a candidate that multiplies square matrices over and over and gives operations per second.

    It gives the fastest pass of the fastest way there is: torch's own product, and oneDNN's where torch has another.

    Args:
        edge: rows of the matrices; None: what suits the device.
    """
    edge = edge or _EDGE[device.type]
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(edge, edge, generator=generator).to(device, dtype)
    ways: list[Callable[[], Tensor]] = [lambda: matrix @ matrix]
    if device.type == "cpu" and dtype == torch.float32 and has_onednn():
        ways.append(lambda: onednn_matmul(matrix, matrix))
    return lambda count: peak_rate(ways, 2 * edge**3, device, clock)


@torch.inference_mode()
def peak_rate(ways: list[Callable[[], Tensor]], n_operations: int, device: torch.device, clock: Clock) -> float:
    """Return operations per second of the fastest pass of several ways to make ``n_operations``."""
    seconds = []
    for multiply in ways:
        for _ in range(_PASSES):
            began = clock()
            multiply()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(clock() - began)
    return n_operations / min(seconds)

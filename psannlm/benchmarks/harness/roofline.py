"""Rooflines: measured memory bandwidth and matrix peak, and the fraction of them that a model reaches.

A decoding step reads every packed weight and the KV cache of every row once and does little else. The time to read
them is a lower bound of its own time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from psannlm.benchmarks.decoding.modes import finish
from psannlm.benchmarks.harness.interleaved import Clock, Count
from psannlm.generation.engine import Engine
from psannlm.kernels.onednn import has_onednn, onednn_matmul
from psannlm.models.accounting import cache_bytes

_BYTES_PER_RUN = 2_000_000_000
# Reads queued on a GPU before waiting: launching one and waiting for it takes as long as reading some 50 MB.
_READS_AT_ONCE_ON_GPU = 16


def step_bytes(engine: Engine, n_rows: int, length: int) -> int:
    """Return the bytes that one decoding step reads when each of ``n_rows`` rows holds ``length`` tokens."""
    return engine.weight_bytes + cache_bytes(engine.model.config, n_rows, length, engine.cache_dtype.itemsize)


def memory_reader(n_bytes: int, device: torch.device, *, clock: Clock = time.perf_counter) -> Callable[[Count], float]:
    """Return a benchmark candidate that reads a tensor of ``n_bytes`` repeatedly and returns the bytes per second.

    With the size of a decoding step's reads, the processor's caches help the candidate as much as the step.
    """
    numbers = torch.ones(max(1, n_bytes // 4), device=device)
    # Rows, because some libraries parallelize the sum of one long vector less well than many short sums.
    rows = numbers[: numbers.numel() // 1024 * 1024].view(-1, 1024) if numbers.numel() >= 1024 else numbers[None]
    at_once = _READS_AT_ONCE_ON_GPU if device.type == "cuda" else 1

    def several(read: Callable[[], torch.Tensor]) -> Callable[[], None]:
        return lambda: finish([read() for _ in range(at_once)][-1])

    ways = [several(way) for way in (numbers.sum, lambda: torch.dot(numbers, numbers), lambda: rows.sum(1))]
    passes = min(50, max(3, _BYTES_PER_RUN // n_bytes))
    return lambda count: read_rate(ways, n_bytes * at_once, passes, clock)


@torch.inference_mode()
def read_rate(ways: Sequence[Callable[[], object]], n_bytes: int, passes: int, clock: Clock) -> float:
    """Return the bytes per second of the fastest way to read ``n_bytes``, each way by its median pass."""
    rates = []
    for read in ways:
        seconds = []
        for _ in range(passes):
            began = clock()
            read()
            seconds.append(clock() - began)
        rates.append(n_bytes / statistics.median(seconds))
    return max(rates)


# Edge of the square matrices: large enough for full speed, multiplied in a fraction of a second.
_EDGE = {"cpu": 1536, "cuda": 8192}
_PASSES = 4


def matrix_peak(
    device: torch.device, dtype: torch.dtype, *, edge: int | None = None, clock: Clock = time.perf_counter
) -> Callable[[Count], float]:
    """Return a benchmark candidate that multiplies square matrices and returns the operations per second.

    The result is that of the fastest pass, over torch's own product and, in float32 on a CPU, oneDNN's.

    Args:
        edge: rows of the matrices; None chooses by device.
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
    """Return the operations per second of the fastest pass over several ways to compute ``n_operations``."""
    seconds = []
    for multiply in ways:
        for _ in range(_PASSES):
            began = clock()
            multiply()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(clock() - began)
    return n_operations / min(seconds)

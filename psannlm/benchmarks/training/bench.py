"""Training throughput benchmark: our model, its variants and a reference model, interleaved in one run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from psannlm.benchmarks.harness.interleaved import Clock, Count, run_interleaved
from psannlm.benchmarks.harness.roofline import matrix_peak
from psannlm.benchmarks.training.candidates import (
    Candidate,
    ThroughputSettings,
    TrainingRun,
    TrainingRunBuilder,
    size_of,
)
from psannlm.benchmarks.training.peak_memory import peak_step_bytes
from psannlm.benchmarks.training.report import ThroughputReport, Trained
from psannlm.kernels.compiler import require_compiler
from psannlm.runtime.device import describe_device, pick_precision
from psannlm.runtime.progress import OnProgress, ignore_progress

MemoryProbe = Callable[[Candidate, ThroughputSettings, torch.device], int | None]

_PEAK = "matrix products"
_RUN_S = 1.0
_MAX_STEPS = 50


def bench_train(
    settings: ThroughputSettings,
    device: torch.device,
    *,
    build: TrainingRunBuilder = TrainingRun,
    measure_memory: MemoryProbe | None = peak_step_bytes,
    clock: Clock = time.perf_counter,
    on_progress: OnProgress = ignore_progress,
) -> ThroughputReport:
    """Time the training steps of all candidates of ``settings``, interleaved, on one batch that is used repeatedly.

    The first step of each, compilation included, is timed separately; warm-up steps are discarded. Peak memory is
    measured before, in processes of their own.

    Args:
        measure_memory: None skips the memory measurement.

    Raises:
        DeviceError: the requested precision or compiler is not available.
    """
    candidates = {candidate.name: candidate for candidate in settings.candidates()}
    precision = pick_precision(settings.amp, device)
    if any(candidate.is_compiled for candidate in candidates.values()):
        # Before any measurement, which would be lost.
        require_compiler(device, "--compile or --also compile", "leave it out")

    def interleave(
        work: dict[str, Callable[[Count], float]], repeats: int, unit: str = "steps"
    ) -> dict[str, list[float]]:
        return run_interleaved(work, repeats, warm_ups=0, unit=unit, clock=clock, on_progress=on_progress)

    peaks: dict[str, int | None] = dict.fromkeys(candidates)
    if measure_memory is not None:
        probe = measure_memory
        probes = {f"memory of {n}": _probe(probe, t, settings, device) for n, t in candidates.items()}
        taken = run_interleaved(probes, 1, warm_ups=0, clock=clock, on_progress=on_progress)
        peaks = {name: taken[f"memory of {name}"][0] for name in candidates}
    runs = {name: build(candidate, settings, device) for name, candidate in candidates.items()}
    firsts = interleave({f"first step of {name}": _timed(run, 1, clock) for name, run in runs.items()}, 1)
    warm = interleave({name: _timed(run, 1, clock) for name, run in runs.items()}, settings.warmup)
    n_steps = settings.steps or _steps_per_run(min(min(seconds) for seconds in warm.values()))
    counted_work = {name: _timed(run, n_steps, clock) for name, run in runs.items()}
    counted_work[_PEAK] = matrix_peak(device, precision.dtype, clock=clock)
    counted = interleave(counted_work, settings.repeats)
    rows = []
    for name, candidate in candidates.items():
        parameters, flops = size_of(candidate, settings)
        rows.append(
            Trained(
                candidate=candidate,
                description=runs[name].description,
                parameters=parameters,
                flops_per_token=flops,
                first_step_s=firsts[f"first step of {name}"][0],
                step_s=[seconds / n_steps for seconds in counted[name]],
                peak_bytes=peaks[name],
                losses=runs[name].losses,
            )
        )
    return ThroughputReport(
        settings=settings,
        device=describe_device(device),
        threads=torch.get_num_threads(),
        precision=precision.reason,
        steps_per_run=n_steps,
        matrix_flops_per_s=counted[_PEAK],
        rows=rows,
    )


def _timed(run: TrainingRun, n_steps: int, clock: Clock) -> Callable[[Count], float]:
    def timed_run(count: Count) -> float:
        began = clock()
        run.steps(n_steps, count)
        return clock() - began

    return timed_run


def _probe(
    measure: MemoryProbe, candidate: Candidate, settings: ThroughputSettings, device: torch.device
) -> Callable[[Count], int | None]:
    return lambda count: measure(candidate, settings, device)


def _steps_per_run(step_s: float) -> int:
    return min(_MAX_STEPS, max(1, math.ceil(_RUN_S / step_s))) if step_s > 0 else 1

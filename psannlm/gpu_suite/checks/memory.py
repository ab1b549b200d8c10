"""GPU-04: peak memory of a training step against its estimate, with and without activation checkpointing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from psannlm.benchmarks.training.candidates import Candidate, ThroughputSettings
from psannlm.benchmarks.training.peak_memory import measure_here
from psannlm.config.model import BaseName, ModelConfig
from psannlm.config.train import Amp
from psannlm.gpu_suite.context import BASE_NAMES, CheckContext, Trainer, draw_tokens, micro_batch
from psannlm.gpu_suite.measures import at_most
from psannlm.models.accounting import training_memory
from psannlm.reports.schemas.gpu import CheckResult, Measure

PREDICTION_LIMIT = 0.15
SAVING_LIMIT = 0.8
_STEP = "the step that is measured"


@dataclass(frozen=True)
class Peak:
    """Peak bytes of a step, weights and optimizer included, and the loss of the first step."""

    n_bytes: int
    loss: float


def check_memory(context: CheckContext) -> CheckResult:
    """GPU-04: peak memory with and without gradient checkpointing at the same work."""
    shape = context.sizes.memory
    dtype = context.low_precision() if context.is_gpu else torch.float32
    measures: list[Measure] = []
    for base in BASE_NAMES:
        config = shape.config(base)
        peaks, predicted = {}, {}
        for is_checkpointed in (False, True):
            context.say(f"GPU-04: {base}, {'recomputing' if is_checkpointed else 'keeping'} activations")
            peaks[is_checkpointed] = _peak(context, base, dtype, is_checkpointed)
            predicted[is_checkpointed] = training_memory(
                config,
                shape.n_rows,
                shape.seq_len,
                dtype=dtype,
                grad_checkpoint=is_checkpointed,
                device_type=context.device.type,
            ).total
        measures += memory_measures(base, peaks, predicted)
    return CheckResult(
        "GPU-04",
        "memory",
        tuple(measures),
        notes=(
            f"{shape.n_tokens:,} tokens per step, {shape.n_layers} layers of {shape.d_model}, "
            + ("counted by the CUDA allocator" if context.is_gpu else "CPU allocations counted by the profiler"),
        ),
    )


def _peak(context: CheckContext, base: BaseName, dtype: torch.dtype, is_checkpointed: bool) -> Peak:
    shape = context.sizes.memory
    config = shape.config(base)
    if context.is_gpu:
        amp: Amp = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")  # type: ignore[assignment]
        settings = ThroughputSettings(model=config, seq_len=shape.seq_len, batch_tokens=shape.n_tokens, amp=amp)
        n_bytes = measure_here(Candidate(base, grad_checkpoint=is_checkpointed), settings, context.device)
        context.release()
        trainer = Trainer.build(context, config, dtype, grad_checkpoint=is_checkpointed)
        return Peak(n_bytes, trainer.step([micro_batch(draw_tokens(shape, seed=3))]).loss)
    return _peak_on_cpu(context, config, dtype, is_checkpointed)


def _peak_on_cpu(context: CheckContext, config: ModelConfig, dtype: torch.dtype, is_checkpointed: bool) -> Peak:
    """Return the same from the profiler's record of all allocations and releases, in order.

    At the sizes of a dry run resident memory is too coarse: it grows by the system's allocation granularity.
    """
    batches = [micro_batch(draw_tokens(context.sizes.memory, seed=3))]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        trainer = Trainer.build(context, config, dtype, grad_checkpoint=is_checkpointed)
        loss = trainer.step(batches).loss
        with torch.profiler.record_function(_STEP):
            trainer.step(batches)
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = highest = 0
    is_measured = False
    for event in events:
        is_measured = is_measured or event.name() == _STEP
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held) if is_measured else held
    return Peak(highest, loss)


def memory_measures(base: str, peaks: dict[bool, Peak], predicted: dict[bool, int]) -> list[Measure]:
    """Return the error of each estimate, the saving by recomputation, and its change of the loss."""
    measures = []
    for is_checkpointed, peak in peaks.items():
        name = f"{base}, {'recomputing' if is_checkpointed else 'keeping'} activations"
        off = abs(peak.n_bytes / predicted[is_checkpointed] - 1.0)
        reason = f"{predicted[is_checkpointed] / 1e6:,.1f} MB were estimated: training is planned with this figure"
        most = f"the estimate plus {PREDICTION_LIMIT:.0%}"
        limit = predicted[is_checkpointed] * (1.0 + PREDICTION_LIMIT) / 1e6
        measures += [
            at_most(f"{name}: off its prediction", off, PREDICTION_LIMIT, "of it", reason),
            at_most(f"{name}: peak", peak.n_bytes / 1e6, limit, "MB", most, regression=0.05),
        ]
    saved = peaks[True].n_bytes / peaks[False].n_bytes
    why = "activations are most of the memory at this size, and recomputation keeps one tensor per block"
    same = "recomputation repeats the same operations"
    change = abs(peaks[True].loss - peaks[False].loss) / abs(peaks[False].loss)
    return [
        *measures,
        at_most(f"{base}: peak, recomputing / keeping", saved, SAVING_LIMIT, "x", why),
        at_most(f"{base}: change of the loss by recomputing", change, 1e-5, "of the loss", same),
    ]

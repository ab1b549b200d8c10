"""GPU-03: throughput of training and forward passes, their fraction of the matrix peak, and the cost of the sine."""

from __future__ import annotations

import math
import statistics
from contextlib import suppress
from dataclasses import replace

import torch

from psannlm.benchmarks.harness.interleaved import Count, run_interleaved
from psannlm.benchmarks.training.bench import bench_train
from psannlm.benchmarks.training.candidates import ThroughputSettings
from psannlm.benchmarks.training.report import ThroughputReport
from psannlm.config.model import BaseName, ModelConfig
from psannlm.config.train import Amp
from psannlm.gpu_suite.checks.rates import (
    PUBLISHED_BY,
    PUBLISHED_FORWARD,
    Rates,
    card_of,
    large_measures,
    rate_measures,
)
from psannlm.gpu_suite.context import BASE_NAMES, CheckContext, Shape, Trainer, draw_tokens, dtype_name, micro_batch
from psannlm.kernels.compiler import has_compiler
from psannlm.models.accounting import training_memory
from psannlm.reports.schemas.gpu import CheckResult, Measure
from psannlm.reports.schemas.measured import Spread
from psannlm.runtime.device import describe_device

_PASSES_PER_TURN = 10
_MEMORY_FRACTION = 0.8
_OUT_OF_MEMORY = "torch.OutOfMemoryError in a batch that was estimated to fit: see GPU-04"


def check_speed(context: CheckContext) -> CheckResult:
    """GPU-03: training and forward throughput of every base at every batch size."""
    is_compiled = context.is_gpu and has_compiler(context.device)
    measures: list[Measure] = []
    notes = [
        f"{dtype_name(context.low_precision())}, {'compiled' if is_compiled else 'plain'}; utilisation: 6 operations "
        "per matrix weight and token, and attention, beside the measured rate of large matrix products",
        f"{PUBLISHED_BY}: {', '.join(f'{base} {rate:,.0f}' for base, rate in PUBLISHED_FORWARD.items())} tokens/s",
    ]
    series: dict[str, list[float]] = {"batch tokens": []}
    for batch_tokens in context.sizes.batch_tokens:
        shape = replace(context.sizes.speed, n_rows=batch_tokens // context.sizes.speed.seq_len)
        measured = None
        # Released below, not in an except clause: an error being handled keeps the tensors of its frames alive.
        with suppress(torch.OutOfMemoryError):
            measured = _measure_bases(context, shape, is_compiled)
        if measured is None:
            context.release()
            notes.append(
                f"{batch_tokens:,} batch tokens do not fit into the memory of {describe_device(context.device)}"
            )
            continue
        rates, sine_cost = measured
        series["batch tokens"].append(float(batch_tokens))
        for name, found in rates.items():
            notes += [f"{name}, {batch_tokens:,} tokens: {problem}" for problem in found.problems]
            series.setdefault(f"{name}: training", []).append(found.training.median)
            if found.forward is not None:
                series.setdefault(f"{name}: forward", []).append(found.forward.median)
        measures += rate_measures(rates, sine_cost, batch_tokens, card_of(context))
    measures += _utilisation(context, is_compiled, notes)
    return CheckResult("GPU-03", "throughput", tuple(measures), notes=tuple(notes), series=series)


def _train(
    context: CheckContext, config: ModelConfig, shape: Shape, is_compiled: bool, *, with_gelu: bool
) -> ThroughputReport:
    """Measure training as ``psannlm bench-train`` does, optionally beside the same network with GELU."""
    amp: dict[torch.dtype, Amp] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    settings = ThroughputSettings(
        model=config,
        seq_len=shape.seq_len,
        batch_tokens=shape.n_tokens,
        amp=amp[context.low_precision()],
        is_compiled=is_compiled,
        steps=1 if context.is_dry_run else None,
        repeats=context.sizes.repeats,
        warmup=1 if context.is_dry_run else 5,
        also=("gelu",) if with_gelu else (),
    )
    return bench_train(settings, context.device, measure_memory=None, clock=context.clock)


def _measure_bases(context: CheckContext, shape: Shape, is_compiled: bool) -> tuple[dict[str, Rates], float]:
    """Return the throughputs of every base, and the step time of respsann over that with GELU instead of the sine."""
    rates, sine_cost = {}, float("nan")
    for base in BASE_NAMES:
        context.say(f"GPU-03: {base}, {shape.n_tokens:,} batch tokens")
        config = shape.config(base)
        report = _train(context, config, shape, is_compiled, with_gelu=base == "respsann")
        cost = report.sine_cost(is_compiled)
        sine_cost = sine_cost if cost is None else 1.0 + cost.median
        forward = _forward(context, config, shape, is_compiled)
        rates[str(base)] = _rates(report, forward)
        context.release()
    return rates, sine_cost


def _rates(report: ThroughputReport, forward: Spread | None) -> Rates:
    return Rates(
        training=report.tokens_per_s(report.ours),
        forward=forward,
        utilisation=report.utilisation(report.ours).median,
        flops_per_token=report.ours.flops_per_token,
        peak_flops_per_s=statistics.median(report.matrix_flops_per_s),
        problems=tuple(report.problems),
    )


def _forward(context: CheckContext, config: ModelConfig, shape: Shape, is_compiled: bool) -> Spread:
    """Measure forward passes from ids to the loss, LM head and softmax included; no logits are kept."""
    trainer = Trainer.build(context, config, context.low_precision(), is_compiled=is_compiled)
    trainer.model.eval()
    batch = micro_batch(draw_tokens(shape, seed=4).to(context.device))
    n_passes = 1 if context.is_dry_run else _PASSES_PER_TURN

    @torch.no_grad()
    def timed_run(count: Count) -> float:
        context.wait()
        began = context.clock()
        for _ in range(n_passes):
            with trainer.precision.autocast():
                trainer.module(batch.input_ids, batch.labels)
        context.wait()
        return n_passes * shape.n_tokens / (context.clock() - began)

    return Spread.of(
        run_interleaved({"forward": timed_run}, context.sizes.repeats, warm_ups=1, clock=context.clock)["forward"]
    )


def _utilisation(context: CheckContext, is_compiled: bool, notes: list[str]) -> list[Measure]:
    """Measure training of a compute-bound model in the largest batch that fits."""
    shape = context.sizes.utilisation
    measures = []
    bases: tuple[BaseName, ...] = ("waveresnet", "transformer")
    for base in bases:
        config, case = shape.config(base), f"{base}, the large model"
        fitting = fitting_rows(config, shape, context.low_precision(), _free_bytes(context))
        if fitting is None:
            notes.append(f"{case}: does not fit into the memory of {describe_device(context.device)}")
            continue
        context.say(f"GPU-03: {case}, {fitting.d_model} wide, {fitting.n_layers} layers")
        notes.append(f"{case}: {fitting.n_tokens:,} batch tokens")
        found = Rates(Spread.of([0.0]), None, 0.0, 1, math.nan, (_OUT_OF_MEMORY,))
        with suppress(torch.OutOfMemoryError):
            report = _train(context, config, fitting, is_compiled, with_gelu=False)
            notes[-1] += f", {report.ours.parameters / 1e6:,.1f}M parameters"
            found = _rates(report, None)
        context.release()
        notes += [f"{case}: {problem}" for problem in found.problems]
        measures += large_measures(case, found, card_of(context))
    return measures


def _free_bytes(context: CheckContext) -> int:
    return torch.cuda.mem_get_info(context.device)[0] if context.is_gpu else 1 << 40


def fitting_rows(config: ModelConfig, shape: Shape, dtype: torch.dtype, free_bytes: int) -> Shape | None:
    """Return ``shape`` with rows halved until training is estimated to leave 20% free; None: nothing fits."""
    n_rows = shape.n_rows
    while n_rows:
        if (
            training_memory(config, n_rows, shape.seq_len, dtype=dtype, device_type="cuda").total
            <= _MEMORY_FRACTION * free_bytes
        ):
            return replace(shape, n_rows=n_rows)
        n_rows //= 2
    return None

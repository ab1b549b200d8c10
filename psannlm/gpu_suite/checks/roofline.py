"""Throughput of GPU-07: one row decoded with a model of several GB, against the memory-bandwidth roofline.

A step of a small model is bound by kernel launches. Only a model whose weights take longer to read than its kernels
take to launch can come close to the roofline.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from psannlm.benchmarks.decoding.modes import DecodeRun, decode
from psannlm.benchmarks.harness.interleaved import Count, run_interleaved
from psannlm.benchmarks.harness.roofline import memory_reader, step_bytes
from psannlm.config.model import BaseName, ModelConfig
from psannlm.generation.engine import Engine
from psannlm.generation.quantize import WeightDtype
from psannlm.gpu_suite.context import CheckContext, Shape
from psannlm.gpu_suite.measures import at_least
from psannlm.kernels.compiler import has_compiler
from psannlm.models.accounting import count_parameters
from psannlm.models.transformer import Transformer
from psannlm.reports.schemas.decoding import RooflineFraction
from psannlm.reports.schemas.gpu import Measure
from psannlm.reports.schemas.measured import Spread
from psannlm.runtime.device import describe_device

# Least fractions of a step in which it reads memory, for compiled and plain decoding: with weights of several GB, and
# of half a GB, which are read in a tenth of a millisecond.
LARGE_LIMITS = {True: 0.7, False: 0.2}
SMALL_LIMITS = {True: 0.1, False: 0.02}
RATE_REGRESSION = 0.1
# A model with fewer bytes is not one of several GB.
_LEAST_BYTES = 1.5e9
# Float32 weights, a bfloat16 copy, and the tensor whose reads are timed.
_BYTES_PER_PARAMETER = 8
_MEMORY_FRACTION = 0.8
_NOTHING = "no throughput limit applies in a dry run"
_ONLY_READS = "a step of one row mostly reads the weights; the rest is attention and kernel launches"
_LAUNCHES = "without a compiler each of some hundred kernels is launched separately"
_SMALL = "half a GB is read in less time than the kernels of a step take to launch; less is a step that waits"


@dataclass(frozen=True)
class Roofline:
    """Throughput of one row, the fraction of a step in which it reads memory, and the throughput of reads alone."""

    rate: Spread
    fraction: Spread
    reading_tokens_per_s: float

    @classmethod
    def of(cls, rate: Spread, roofline: RooflineFraction) -> Roofline:
        """Build it from the roofline fraction of a step."""
        return cls(rate, roofline.fraction, 1.0 / roofline.roofline_s)


def large_roofline_measures(context: CheckContext, base: BaseName, notes: list[str]) -> list[Measure]:
    """Decode the largest model of ``base`` that fits; its size, or why none fits, is added to ``notes``."""
    shape, case = context.sizes.roofline, f"{base}, several GB"
    least = 0.0 if context.is_dry_run else _LEAST_BYTES
    free = torch.cuda.mem_get_info(context.device)[0] if context.is_gpu else 1 << 40
    fitting = fitting_layers(shape, base, free, least)
    if fitting is None:
        notes.append(f"{case}: left out, because {free / 1e9:,.1f} GB are free on {describe_device(context.device)}")
        return []
    is_compiled = context.is_gpu and has_compiler(context.device)
    dtype: WeightDtype = "bfloat16" if context.is_gpu else "float32"
    context.say(f"GPU-07: {case}, {fitting.d_model} wide, {fitting.n_layers} layers")
    notes.append(f"{case}: {fitting.d_model} wide, {fitting.n_layers} layers, of {free / 1e9:,.1f} GB free")
    nothing = Spread.of([0.0])
    found, detail = Roofline(nothing, nothing, 1.0), "torch.OutOfMemoryError"
    with suppress(torch.OutOfMemoryError):
        found, detail = _decode_row(context, fitting.config(base), dtype, is_compiled), ""
    context.release()
    how = f"{dtype}, {'compiled' if is_compiled else 'plain'}"
    limit, reason = LARGE_LIMITS[is_compiled], _ONLY_READS if is_compiled else _LAUNCHES
    return roofline_measures(case, how, found, limit, reason, is_dry_run=context.is_dry_run, detail=detail)


def fitting_layers(shape: Shape, base: BaseName, free_bytes: int, least_bytes: float) -> Shape | None:
    """Return ``shape`` with layers halved until 20% of memory stays free; None: its weights are under the minimum."""
    n_layers = shape.n_layers
    while n_layers:
        fitting = replace(shape, n_layers=n_layers)
        parameters = sum(count_parameters(fitting.config(base)).values())
        if 2 * parameters < least_bytes:
            return None
        if _BYTES_PER_PARAMETER * parameters <= _MEMORY_FRACTION * free_bytes:
            return fitting
        n_layers //= 2
    return None


def _decode_row(context: CheckContext, config: ModelConfig, dtype: WeightDtype, is_compiled: bool) -> Roofline:
    """Decode one row, interleaved with memory reads of the same size."""
    engine = Engine(_random_model(config, context.device), dtype=dtype, compile=is_compiled)
    length, n_new = context.sizes.prompt_length, context.sizes.new_tokens
    generator = torch.Generator().manual_seed(13)
    prompts: list[list[int]] = torch.randint(config.vocab_size or 0, (1, length), generator=generator).tolist()
    n_bytes = step_bytes(engine, 1, length + n_new // 2)
    read = memory_reader(n_bytes, context.device, clock=context.clock)

    def decoded(count: Count) -> DecodeRun | float:
        return decode(engine, prompts, n_new, is_batched=True, clock=context.clock, count=count)

    taken = run_interleaved({"decode": decoded, "read": read}, context.sizes.repeats, warm_ups=2, clock=context.clock)
    runs = [run for run in taken["decode"] if isinstance(run, DecodeRun)]
    rates = [rate for rate in taken["read"] if isinstance(rate, float)]
    roofline = RooflineFraction.of(n_bytes, rates, [run.decode_s / (n_new - 1) for run in runs])
    return Roofline.of(Spread.of([run.decode_tokens_per_s for run in runs]), roofline)


def _random_model(config: ModelConfig, device: torch.device) -> Transformer:
    """Build a random model on the device: sampling billions of weights on the host takes longer than the check."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device), torch.no_grad():
        model = Transformer(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                # Residual branches start at zero, and multiplying zeros draws less power than a model in use.
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def small_roofline_measures(
    base: str, found: Roofline, how: str, *, is_compiled: bool, is_dry_run: bool
) -> list[Measure]:
    """Return the same for the model whose tokens are compared, which is too small to reach the roofline."""
    return roofline_measures(base, how, found, SMALL_LIMITS[is_compiled], _SMALL, is_dry_run=is_dry_run)


def roofline_measures(
    case: str, how: str, found: Roofline, limit: float, reason: str, *, is_dry_run: bool, detail: str = ""
) -> list[Measure]:
    """Return the decode throughput of one row and its roofline fraction, both against ``limit``."""
    limit, reason = (0.0, _NOTHING) if is_dry_run else (limit, reason)
    least_reason = _NOTHING if is_dry_run else f"{limit:.0%} of the throughput of a step that only reads"
    least = limit * found.reading_tokens_per_s
    return [
        _measure(f"{case}: one row, {how}", found.rate, least, "tokens/s", least_reason, detail),
        _measure(f"{case}: roofline / step, {how}", found.fraction, limit, "of the step", reason, detail),
    ]


def _measure(name: str, spread: Spread, limit: float, unit: str, reason: str, detail: str) -> Measure:
    edges = (spread.lowest, spread.highest)
    return at_least(name, spread.median, limit, unit, reason, regression=RATE_REGRESSION, spread=edges, detail=detail)

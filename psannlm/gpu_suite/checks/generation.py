"""GPU-07 and GPU-09: decoding checked against full forward passes; gains of compilation and CUDA graphs."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from psannlm.benchmarks.decoding.bench import bench_kv, build_random_model
from psannlm.benchmarks.decoding.modes import Case, DecodeRun, Prompts
from psannlm.benchmarks.decoding.report import KvReport, KvSettings
from psannlm.benchmarks.decoding.token_parity import Rounding, compare
from psannlm.config.model import BaseName
from psannlm.generation.batch_decode import BatchDecoder
from psannlm.generation.engine import Engine
from psannlm.generation.quantize import WeightDtype
from psannlm.generation.requests import SamplingConfig
from psannlm.gpu_suite.checks.roofline import (
    RATE_REGRESSION,
    Roofline,
    large_roofline_measures,
    small_roofline_measures,
)
from psannlm.gpu_suite.context import BASE_NAMES, CheckContext, Shape, Trainer
from psannlm.gpu_suite.measures import at_least, at_most, largest, largest_distance, none_of
from psannlm.kernels.compiler import has_compiler, missing_to_compile
from psannlm.kernels.torch_private import compiler_counters, cuda_graph_manager
from psannlm.models.transformer import Transformer
from psannlm.reports.schemas.gpu import CheckResult, Measure
from psannlm.reports.schemas.measured import Spread

_WARM_UP_REGRESSION = 1.0
_COMPILED_LOSS_LIMIT = 1e-3
_WARM_UP_LIMIT_S = 300.0


def check_generation(context: CheckContext) -> CheckResult:
    """GPU-07: token parity with and without the cache, batched and alone; throughput against the memory roofline."""
    measures: list[Measure] = []
    notes: list[str] = []
    for base in BASE_NAMES:
        context.say(f"GPU-07: {base}, with the cache and without")
        report = _bench(context, base, batch_size=context.sizes.decoding.n_rows, cases="batch")
        measures += token_measures(base, report)
        context.say(f"GPU-07: {base}, prompts of many lengths")
        measures.append(ragged_measure(base, _model(context, base), _ragged_prompts(context), context.sizes.new_tokens))
        context.release()
    for base in BASE_NAMES:
        context.say(f"GPU-07: {base}, throughput of one row")
        report, is_compiled = _one_row(context, base)
        notes += [f"{base}: {notice}" for notice in report.notices]
        measures += rate_measures(base, report, is_compiled=is_compiled, is_dry_run=context.is_dry_run)
        context.release()
        measures += large_roofline_measures(context, base, notes)
    return CheckResult("GPU-07", "generation", tuple(measures), notes=tuple(notes))


def _settings(
    context: CheckContext,
    batch_size: int,
    *,
    dtype: WeightDtype = "float32",
    is_compiled: bool = False,
    cases: str = "cached",
) -> KvSettings:
    return KvSettings(
        batch_size=batch_size,
        prompt_length=context.sizes.prompt_length,
        max_new_tokens=context.sizes.new_tokens,
        repeats=context.sizes.repeats,
        dtype=dtype,
        is_compiled=is_compiled,
        cases=cases,  # type: ignore[arg-type]  # the settings check the name themselves
        contexts=(),
    )


def _bench(
    context: CheckContext,
    base: BaseName,
    *,
    batch_size: int,
    cases: str,
    dtype: WeightDtype = "float32",
    is_compiled: bool = False,
) -> KvReport:
    settings = _settings(context, batch_size, dtype=dtype, is_compiled=is_compiled, cases=cases)
    model = build_random_model(context.sizes.decoding.config(base), settings, context.device)
    return bench_kv(model, settings, clock=context.clock)


def _model(context: CheckContext, base: BaseName) -> Transformer:
    settings = _settings(context, 1)
    return build_random_model(context.sizes.decoding.config(base), settings, context.device)


def _one_row(context: CheckContext, base: BaseName) -> tuple[KvReport, bool]:
    """Decode one row as fast as the device can: compiled bfloat16 on a GPU, plain float32 in a dry run."""
    is_compiled = context.is_gpu and has_compiler(context.device)
    dtype: WeightDtype = "bfloat16" if context.is_gpu else "float32"
    report = _bench(context, base, batch_size=1, cases="cached", dtype=dtype, is_compiled=is_compiled)
    return report, is_compiled


def _ragged_prompts(context: CheckContext) -> Prompts:
    generator = torch.Generator().manual_seed(5)
    n_rows, longest = context.sizes.decoding.n_rows, context.sizes.prompt_length
    lengths = [max(1, longest * (row + 1) // n_rows - row) for row in range(n_rows)]
    vocab_size = context.sizes.decoding.vocab_size
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def token_measures(base: str, report: KvReport) -> list[Measure]:
    """Return the number of tokens that the cache changes and the error of its predicted size."""
    difference = report.agreement.difference
    name, where = f"{base}: tokens that the cache changes", "" if difference is None else str(difference)
    reason = "greedy text depends on the weights alone; ties within float32 rounding count as equal"
    predicted, measured = report.predicted_cache_bytes(), report.measured_cache_bytes()
    off = largest(abs(measured[case] - predicted[case]) for case in measured)
    exact = "keys, values and conv states are all that the cache holds: their size is known to the byte"
    return [
        none_of(name, 0 if difference is None else 1, "tokens", reason, detail=where),
        at_least(
            f"{base}: different tokens",
            report.distinct_tokens,
            2,
            "ids",
            "a single repeated id would be equal in any case",
        ),
        at_most(f"{base}: size of the cache beside its prediction", off, 0, "bytes", exact),
    ]


def ragged_measure(base: str, model: Transformer, prompts: Prompts, n_new: int) -> Measure:
    """Return the number of rows that decode differently in a batch of mixed lengths; rounding ties count as equal."""
    engine = Engine(model)
    together = _decode(engine, prompts, n_new)
    rounding = Rounding(copy.deepcopy(model).double(), engine.model)
    wrong = []
    for row, prompt in enumerate(prompts):
        [alone] = _decode(engine, [prompt], n_new)
        runs = {"alone": [_as_run(alone)], "in the batch": [_as_run(together[row])]}
        if compare(engine.model, [prompt], runs, rounding).difference is not None:
            wrong.append(row)
    where = f"rows {wrong}" if wrong else ""
    reason = "a row depends only on its own tokens"
    return none_of(f"{base}: rows that the batch changes", wrong, "rows", reason, detail=where)


def _decode(engine: Engine, prompts: Sequence[Sequence[int]], n_new: int) -> Prompts:
    greedy = SamplingConfig(temperature=0.0)
    decoding = BatchDecoder(engine, prompts, max_new_tokens=n_new, sampling=greedy, eos_id=None)
    for _ in decoding:
        pass
    return decoding.generated


def _as_run(ids: list[int]) -> DecodeRun:
    return DecodeRun([ids], len(ids), 0.0, 0.0, 0.0, 0.0)


def rate_measures(base: str, report: KvReport, *, is_compiled: bool, is_dry_run: bool) -> list[Measure]:
    """Return the decode throughput of one row, and the fraction of a step in which it reads memory."""
    case = Case(True, True, is_compiled)
    how = f"{report.settings.dtype}, {'compiled' if is_compiled else 'plain'}"
    found = Roofline.of(report.throughput(case), report.rooflines()[case])
    return small_roofline_measures(base, found, how, is_compiled=is_compiled, is_dry_run=is_dry_run)


def _rate(name: str, spread: Spread, limit: float, unit: str, reason: str) -> Measure:
    edges = (spread.lowest, spread.highest)
    return at_least(name, spread.median, limit, unit, reason, regression=RATE_REGRESSION, spread=edges)


def check_compiled(context: CheckContext) -> CheckResult:
    """GPU-09: compiled against plain training and decoding: parity, speedup and warm-up time."""
    missing = missing_to_compile(context.device)
    if missing is not None:
        return CheckResult("GPU-09", "compile and CUDA graphs", skipped=f"torch.compile needs {missing}")
    bases: Sequence[BaseName] = ("waveresnet",) if context.is_dry_run else BASE_NAMES
    measures: list[Measure] = []
    notes: list[str] = []
    for base in bases:
        context.say(f"GPU-09: {base}, compiling decoding")
        skips = _graph_skips()
        batch_size = 2 if context.is_dry_run else context.sizes.decoding.n_rows
        report = _bench(context, base, batch_size=batch_size, cases="batch", is_compiled=True)
        measures += compiled_decoding_measures(base, report, is_dry_run=context.is_dry_run)
        if context.is_gpu:
            measures += graph_measures(base, _graph_skips() - skips, _recorded_graphs(context.device))
        notes += [f"{base}: {notice}" for notice in report.notices]
        context.say(f"GPU-09: {base}, compiling training")
        context.release()
        measures += _compiled_training(context, base)
        context.release()
    return CheckResult("GPU-09", "compile and CUDA graphs", tuple(measures), notes=tuple(notes))


def _graph_skips() -> int:
    """Return how often the compiler has skipped CUDA graphs so far in this process."""
    return int(compiler_counters()["inductor"]["cudagraph_skips"])


def _recorded_graphs(device: torch.device) -> int:
    """Return the number of root CUDA graphs recorded on a GPU."""
    index = torch.cuda.current_device() if device.index is None else device.index
    manager = cuda_graph_manager(index)
    return 0 if manager is None else len(list(manager.get_roots()))


def graph_measures(base: str, n_skips: int, n_recorded: int) -> list[Measure]:
    """Return the numbers of skipped and recorded CUDA graphs of decoding."""
    reason = "the compiler skips graphs silently, and decoding is then bound by kernel launches"
    return [
        at_most(f"{base}: passes left out of CUDA graphs", n_skips, 0, "passes", reason),
        at_least(f"{base}: CUDA graphs recorded", n_recorded, 1, "graphs", reason),
    ]


def compiled_decoding_measures(base: str, report: KvReport, *, is_dry_run: bool) -> list[Measure]:
    """Return the tokens that compilation changes, its speedup and its warm-up time."""
    difference, gain = report.agreement.difference, report.from_compiling(True)
    name, where = f"{base}: tokens that compiling changes", "" if difference is None else str(difference)
    ties = "ties within float32 rounding count as equal"
    seconds = largest(report.compile_s().values())
    edges = gain or Spread.of([math.nan])
    return [
        none_of(name, 0 if difference is None else 1, "tokens", ties, detail=where),
        _rate(
            f"{base}: decode rate, compiled / plain",
            edges,
            0.0 if is_dry_run else 1.0,
            "x",
            "no throughput limit applies in a dry run" if is_dry_run else "compilation takes long and must pay off",
        ),
        at_most(
            f"{base}: warm-up of decoding",
            seconds,
            _WARM_UP_LIMIT_S,
            "s",
            "beyond minutes no text is long enough to pay it off",
            regression=_WARM_UP_REGRESSION,
        ),
    ]


def _compiled_training(context: CheckContext, base: BaseName) -> list[Measure]:
    n_steps = context.sizes.n_steps
    # One block in a dry run: each further block is compiled again.
    shape = replace(context.sizes.training, n_layers=1) if context.is_dry_run else context.sizes.training
    config = shape.config(base)
    plain = Trainer.build(context, config, torch.float32)
    plain_curve, plain_s = _timed_curve(context, plain, shape, 0, n_steps)
    compiled = Trainer.build(context, config, torch.float32, is_compiled=True)
    began = context.clock()
    first = compiled.curve(shape, 1)
    warm_up_s = context.clock() - began
    rest, compiled_s = _timed_curve(context, compiled, shape, 1, n_steps)
    return compiled_training_measures(
        base, plain_curve, [*first, *rest], plain_s / compiled_s, warm_up_s, is_dry_run=context.is_dry_run
    )


def _timed_curve(
    context: CheckContext, trainer: Trainer, shape: Shape, first_step: int, n_steps: int
) -> tuple[list[float], float]:
    """Return the losses from ``first_step`` on, and the median seconds of a step with its loss copied to the host."""
    losses, seconds = [], []
    for step in range(first_step, n_steps):
        context.wait()
        began = context.clock()
        losses += trainer.curve(shape, 1, seed=7 + step)
        context.wait()
        seconds.append(context.clock() - began)
    return losses, Spread.of(seconds).median


def compiled_training_measures(
    base: str, plain: Sequence[float], compiled: Sequence[float], gain: float, warm_up_s: float, *, is_dry_run: bool
) -> list[Measure]:
    """Return the distance of compiled from plain training, its speedup and the time of its first step."""
    distance = largest_distance(plain, compiled)
    reason = f"another order of float32 sums changes about 1e-5 nats over {len(plain)} steps"
    limit = 0.0 if is_dry_run else 0.9
    pays = "no throughput limit applies in a dry run" if is_dry_run else "compilation must not slow a step down"
    long = "beyond minutes no short run pays it off"
    return [
        at_most(f"{base}: loss, compiled against plain", distance, _COMPILED_LOSS_LIMIT, "nats", reason),
        at_least(f"{base}: training rate, compiled / plain", gain, limit, "x", pays, regression=RATE_REGRESSION),
        at_most(
            f"{base}: warm-up of training",
            warm_up_s,
            _WARM_UP_LIMIT_S,
            "s",
            long,
            regression=_WARM_UP_REGRESSION,
        ),
    ]

"""psannlm bench-kv: decoding throughput with and without KV cache, batching and compilation."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from psannlm.commands.options import (
    DEFAULT_RUNS,
    AgainstOption,
    BaseOption,
    DeviceOption,
    DtypeOption,
    HeadsOption,
    JsonOption,
    LayersOption,
    PositionsOption,
    VocabularyOption,
    WidthOption,
    chosen_device,
    duration_s,
    figures_table,
    find_model_file,
    is_given,
    live_line,
    model_config,
    open_table,
    print_path,
    publish,
    refuse_sizes,
    stderr_console,
    stdout_console,
    table_text,
)

if TYPE_CHECKING:
    import torch

    from psannlm.benchmarks.decoding.modes import Case, DecodeRun
    from psannlm.benchmarks.decoding.report import KvReport, KvSettings
    from psannlm.models.transformer import Transformer
    from psannlm.reports.schemas.decoding import DecodingMetrics
    from psannlm.reports.schemas.measured import Spread
    from psannlm.runtime.progress import Progress

log = logging.getLogger(__name__)

PLOT_FILE = "decode.png"
_TIME_LIMIT_S = 100.0


BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Number of prompts decoded together.")]
CompileOption = Annotated[
    bool,
    typer.Option("--compile/--no-compile", help="Measure the compiled engine (torch.compile) beside the plain one."),
]
CasesOption = Annotated[
    str,
    typer.Option(
        "--cases",
        help="Ways of decoding to measure: all, batch (no single rows) or cached (no decoding without the cache).",
    ),
]
UncachedStepsOption = Annotated[
    int | None,
    typer.Option(
        "--uncached-steps",
        min=2,
        help="Number of full forward passes timed after a row's first token, spread evenly; default: all of them.",
    ),
]
ContextOption = Annotated[
    bool,
    typer.Option(
        "--context-growth/--no-context-growth", help="Time a decoding step at context lengths of 256 to 4,096 tokens."
    ),
]
TrainedOption = Annotated[
    Path | None,
    typer.Option("--checkpoint", "-c", help="Trained model to decode with, at its own sizes; default: random weights."),
]
TimeLimitOption = Annotated[
    float | None,
    typer.Option(
        "--time-limit",
        metavar="DURATION",
        parser=duration_s,
        help="Time limit, such as 90s or 20m; uncached passes, repeats and contexts beyond it are left out. "
        "Default: 100s, or no limit with --repeats or --uncached-steps.",
    ),
]


def bench_kv(
    context: typer.Context,
    batch_size: BatchOption = 8,
    prompt_length: Annotated[int, typer.Option(min=1, help="Length of each prompt, in tokens.")] = 96,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Number of tokens generated for each prompt.")] = 64,
    base: BaseOption = "waveresnet",
    d_model: WidthOption = 512,
    n_layers: LayersOption = 8,
    n_heads: HeadsOption = 8,
    positional_encoding: PositionsOption = "rope",
    vocab_size: VocabularyOption = 4096,
    checkpoint: TrainedOption = None,
    dtype: DtypeOption = "float32",
    is_compiled: CompileOption = False,
    cases: CasesOption = "all",
    uncached_steps: UncachedStepsOption = None,
    context_growth: ContextOption = True,
    against: AgainstOption = None,
    device: DeviceOption = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed runs per case; the median is reported.")] = 3,
    time_limit: TimeLimitOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random weights and prompts.")] = 1337,
    out: Annotated[Path | None, typer.Option("--out", help="Output folder; default: reports/kv_cache/<time>.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure decoding with and without the KV cache, batched and row by row, and check that the tokens agree."""
    if checkpoint is not None:
        refuse_sizes(context, "--checkpoint")
    has_default_work = not any(is_given(context, name) for name in ("repeats", "uncached_steps"))

    from psannlm.benchmarks.decoding.context_length import CONTEXTS
    from psannlm.benchmarks.decoding.report import KvSettings
    from psannlm.errors import LimitMissed
    from psannlm.io.run_metadata import require_folder

    settings = KvSettings(
        batch_size=batch_size,
        prompt_length=prompt_length,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        seed=seed,
        dtype=dtype,
        is_compiled=is_compiled,
        cases=cases,  # type: ignore[arg-type]  # the settings check the name themselves
        uncached_steps=uncached_steps,
        contexts=CONTEXTS if context_growth else (),
        against=tuple(against or ()),
        time_limit_s=_TIME_LIMIT_S if time_limit is None and has_default_work else time_limit,
    )
    require_folder("kv_cache", out)
    chosen = chosen_device(device, is_compiled=is_compiled)
    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "vocab_size": vocab_size}
    sizes_and_kinds = {"base": base, "positional_encoding": positional_encoding, **sizes}
    model, weights = _build(sizes_and_kinds, settings, chosen) if checkpoint is None else _load(checkpoint, chosen)
    kept = _Kept(out)
    report = _measure(model, weights, settings, kept)
    _publish(report, kept.folder, as_json)
    if report.problems:
        raise LimitMissed("; ".join(report.problems))


def _build(sizes: dict[str, str | int], settings: KvSettings, device: torch.device) -> tuple[Transformer, str]:
    """Return a model of random weights, and where the weights come from."""
    from psannlm.benchmarks.decoding.bench import build_random_model

    return build_random_model(model_config(**sizes), settings, device), "random"


def _load(checkpoint: Path, device: torch.device) -> tuple[Transformer, str]:
    """Return a trained model, and where the weights come from."""
    from psannlm.models.artifact import load_model

    path = find_model_file(checkpoint, DEFAULT_RUNS)
    return load_model(path).model.to(device), str(path)


def _measure(model: Transformer, weights: str, settings: KvSettings, kept: _Kept) -> KvReport:
    """Run the benchmark with a progress line; if it is interrupted, the figures so far are kept."""
    from psannlm.benchmarks.decoding.bench import bench_kv as measure

    try:
        with live_line(stderr_console()) as line:

            def show(event: Progress) -> None:
                kept.progress = event
                line.show(event)

            return measure(model, settings, weights=weights, on_progress=show, on_partial=kept.keep)
    except KeyboardInterrupt:
        kept.end()
        raise


def _publish(report: KvReport, folder: Path, as_json: bool) -> None:
    """Write figures, tables and plot to ``folder``, and print them."""
    from psannlm.benchmarks.decoding.context_length import draw_growth

    def draw(folder: Path) -> None:
        if report.growth:
            draw_growth(folder / PLOT_FILE, _plot_title(report), report.growth)

    if not as_json:
        for notice in report.notices:
            log.warning(notice)
    publish("kv_cache", None, report.metrics().as_dict(), _tables(report), as_json, draw=draw, folder=folder)


class _Kept:
    """Figures so far, written after every run, so that an interrupted benchmark leaves them behind."""

    def __init__(self, out: Path | None) -> None:
        from psannlm.reports.schemas.decoding import DecodingMetrics

        self._out = out
        self._metrics = DecodingMetrics(is_complete=False)
        self.progress: Progress | None = None

    @cached_property
    def folder(self) -> Path:
        """The output folder, made when there is something to write."""
        from psannlm.io.run_metadata import new_folder, system_info, write_json

        folder = new_folder("kv_cache", self._out)
        write_json(folder / "system.json", system_info())
        return folder

    def keep(self, metrics: DecodingMetrics) -> None:
        """Write the figures so far."""
        from psannlm.io.run_metadata import write_json

        self._metrics = metrics
        write_json(self.folder / "metrics.json", metrics.as_dict())

    def end(self) -> None:
        """Write the figures so far, the interrupted run and a table, and print them with their folder."""
        from psannlm.io.atomic import write_text

        rows = [
            (case.name, f"{_number(case.tokens_per_s.median)} tokens/s{', a warm-up' if case.is_warm_up else ''}")
            for case in self._metrics.cases
        ]
        if self._metrics.cached_over_naive is not None:
            rows.append(("cached over naive", f"{_number(self._metrics.cached_over_naive.median)} x the throughput"))
        if self.progress is not None:
            rows.append(("interrupted in", str(self.progress)))
            self._metrics = replace(self._metrics, interrupted_in=asdict(self.progress))
        self.keep(self._metrics)
        table = figures_table("decoding, interrupted: figures so far", rows)
        write_text(self.folder / "table.txt", table_text(table))
        stdout_console().print(table)
        print_path(f"written to {self.folder}")


def _tables(report: KvReport) -> list[Table]:
    tables = [_cases_table(report), figures_table("summary", _summary(report)), _roofline_table(report)]
    return [*tables, _growth_table(report)] if report.growth else tables


def _cases_table(report: KvReport) -> Table:
    settings, model = report.settings, report.model
    table: Table = open_table(
        f"decoding: {model.base}, {report.parameters / 1e6:,.1f}M parameters ({report.weights} weights), "
        f"{settings.dtype}, {report.device}; {settings.batch_size} prompt{'' if settings.batch_size == 1 else 's'} of "
        f"{settings.prompt_length:,} tokens, "
        f"{settings.max_new_tokens:,} new; {_runs_made(report)}",
        *("case", "prefill\nms", "first token\nms", "decode\ntokens/s", "whole\ntokens/s"),
    )
    for case, runs in report.runs.items():
        _add_runs(table, _name(case), runs)
    for reference_model in report.reference_models:
        _add_runs(table, reference_model.name, reference_model.runs)
    notes = []
    if any(not case.is_batched for case in report.runs):
        notes.append("row by row: prefill is the sum over rows, first token the mean over rows")
    if report.n_uncached_passes < settings.max_new_tokens and any(not case.use_cache for case in report.runs):
        notes.append(
            f"cache off: {report.n_uncached_passes} of {settings.max_new_tokens} forward passes of a row timed, spread "
            "evenly; the seconds of the others are interpolated"
        )
    table.caption = "\n".join(notes)
    return table


def _runs_made(report: KvReport) -> str:
    counts = sorted({len(runs) for runs in report.runs.values()})
    if counts[-1] == 1:
        return "one run of each case"
    of = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} runs"
    return f"medians of {of}, with the lowest and highest run below"


def _add_runs(table: Table, name: str, runs: list[DecodeRun]) -> None:
    from psannlm.reports.schemas.measured import Spread

    figures = (
        [1e3 * run.prefill_s for run in runs],
        [1e3 * run.first_token_s for run in runs],
        [run.decode_tokens_per_s for run in runs],
        [run.tokens_per_s for run in runs],
    )
    table.add_row(name, *(_spread(Spread.of(values), is_cell=True) for values in figures))


def _summary(report: KvReport) -> list[tuple[str, str]]:
    ratios = [
        ("cache alone, batch", report.from_cache(True)),
        ("cache alone, one row", report.from_cache(False)),
        ("batching alone, with cache", report.from_batching(True)),
        ("batching alone, compiled", report.from_batching(True, True)),
        ("batching alone, no cache", report.from_batching(False)),
        ("compiling alone, batch", report.from_compiling(True)),
        ("compiling alone, one row", report.from_compiling(False)),
    ]
    rows = _headline(report)
    rows += [(name, f"{_spread(ratio)} x the decode throughput") for name, ratio in ratios if ratio is not None]
    for case, seconds in report.compile_s().items():
        rows.append((f"compilation, {_rows_of(case.is_batched)}", f"{seconds:,.1f} s, once"))
    if report.reference_models:
        rows.append(("our parameters", f"{report.parameters:,}; {report.settings.dtype}; {report.ours}"))
    for reference_model in report.reference_models:
        name, ratio = reference_model.name, report.over_reference_model(reference_model)
        rows += [
            ("reference model", reference_model.description),
            (f"ours / {name}, whole", f"{_spread(ratio['whole'])} x the throughput"),
            (f"ours / {name}, decode", f"{_spread(ratio['decode'])} x the throughput after the first token"),
            (f"{name}, first run", f"{reference_model.first_s:,.1f} s, compilation included"),
        ]
    if report.packing is not None:
        cost = report.packing
        rows.append(
            (
                f"perplexity, {report.settings.dtype}",
                f"{cost.ratio:.5f} ± {cost.ratio_error:.5f} x that of float32 ({cost.packed_perplexity:,.2f} against "
                f"{cost.perplexity:,.2f}, on {cost.n_tokens:,} tokens sampled from the float32 model)",
            )
        )
    predictions = report.predicted_cache_bytes()
    for case, measured in report.measured_cache_bytes().items():
        predicted = predictions[case]
        verdict = "as predicted" if measured == predicted else f"predicted: {predicted:,}"
        if not case.is_compiled or measured != predicted:
            rows.append((f"cache bytes, {_rows_of(case.is_batched)}", f"{measured:,} ({verdict})"))
    return [*rows, ("token parity", _agreement(report))]


def _headline(report: KvReport) -> list[tuple[str, str]]:
    """Return the throughput of the cached batch and of the naive loop, and their ratio."""
    from psannlm.benchmarks.decoding.modes import Case
    from psannlm.reports.schemas.measured import Spread

    def rate(case: Case) -> str:
        return f"{_spread(Spread.of([run.tokens_per_s for run in report.runs[case]]))} tokens/s"

    settings = report.settings
    rows = [
        ("generated tokens", f"{report.n_generated:,} in a run: {settings.batch_size:,} x {settings.max_new_tokens:,}"),
        ("cached, in a batch", f"{rate(Case(True, True))}, prefill included"),
    ]
    ratio = report.cached_over_naive()
    if report.naive is not None and ratio is not None:
        rows += [
            ("naive, row by row", f"{rate(report.naive)}: one full forward pass per token and row"),
            ("cached over naive", f"{_spread(ratio)} x the throughput"),
        ]
    return rows


def _roofline_table(report: KvReport) -> Table:
    table: Table = open_table(
        "a decoding step and its roofline: the time to read its weights and cache once, at the memory bandwidth "
        "measured between the runs",
        *("case", "step\nms", "reads\nMB", "memory\nGB/s", "roofline\nms", "roofline\n/ step"),
    )
    for case, roofline in report.rooflines().items():
        table.add_row(
            _name(case),
            _spread(roofline.step_s, scale=1e3, is_cell=True),
            f"{roofline.n_bytes / 1e6:,.1f}",
            _spread(roofline.bytes_per_s, scale=1e-9, is_cell=True),
            f"{1e3 * roofline.roofline_s:,.2f}",
            _spread(roofline.fraction, is_cell=True, is_percent=True),
        )
    return table


def _agreement(report: KvReport) -> str:
    agreement = report.agreement
    if agreement.difference is not None:
        text = str(agreement.difference)
    elif agreement.tied_places:
        text = (
            f"equal in all cases but for {agreement.tied_places:,} rounding ties: logits up to "
            f"{agreement.largest_tie:.2g} apart (tolerance {agreement.largest_tolerance:.2g})"
        )
    else:
        text = "equal in all cases"
    return f"{text}; {agreement.n_checked:,} tokens compared, {report.distinct_tokens:,} distinct ids"


def _growth_table(report: KvReport) -> Table:
    settings = report.settings
    engine = f"{settings.dtype}{', compiled' if report.ours.is_compiled else ''}"
    table: Table = open_table(
        f"a decoding step of {settings.batch_size} rows by context length, {engine}; the roofline is the time to read "
        "weights and cache once",
        *("context", "step\nms", "roofline\nms", "roofline\n/ step", "tokens/s", "cache\nMB"),
    )
    for point in report.growth:
        table.add_row(
            f"{point.context:,}",
            _spread(point.step_s, scale=1e3, is_cell=True),
            f"{1e3 * point.roofline_s:,.2f}",
            _spread(point.fraction, is_cell=True, is_percent=True),
            f"{settings.batch_size / point.step_s.median:,.0f}",
            f"{point.cache_bytes / 1e6:,.1f}",
        )
    if report.left_out:
        contexts = ", ".join(f"{context:,}" for context in report.left_out)
        table.caption = f"left out, beyond the model's context of {report.model.max_seq_len:,} tokens: {contexts}"
    return table


def _plot_title(report: KvReport) -> str:
    settings = report.settings
    rows = f"{settings.batch_size} row{'' if settings.batch_size == 1 else 's'}"
    engine = f"{settings.dtype}{', compiled' if report.ours.is_compiled else ''}"
    return f"Decoding with the KV cache: {report.model.base}, {report.parameters / 1e6:,.1f}M, {engine}, {rows}"


def _name(case: Case) -> str:
    return str(case).replace(", compiled", ",\ncompiled")


def _rows_of(is_batched: bool) -> str:
    return "batch" if is_batched else "one row"


def _spread(spread: Spread, *, scale: float = 1.0, is_cell: bool = False, is_percent: bool = False) -> str:
    low, middle, high = (value * scale for value in (spread.lowest, spread.median, spread.highest))
    shown = _percent if is_percent else _number
    edges = f"{shown(low)}–{shown(high)}"
    return f"{shown(middle)}\n{edges}" if is_cell else f"{shown(middle)} ({edges})"


def _percent(value: float) -> str:
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def _number(value: float) -> str:
    """Return a number with at least three digits, in at most six characters below ten million."""
    if value >= 1e4:
        return f"{value / 1e3:,.1f}k" if value < 1e5 else f"{value / 1e3:,.0f}k"
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"

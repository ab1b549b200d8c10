"""psannlm bench-kv: sizes of a model and a batch to what the cache and batching are worth in decoding."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from psannlm.commands.options import (
    DEFAULT_RUNS,
    DeviceOption,
    DtypeOption,
    JsonOption,
    duration_s,
    figures_table,
    find_model_file,
    live_line,
    naming_options,
    note,
    print_path,
    publish,
    stderr_console,
    stdout_console,
    table_text,
)

if TYPE_CHECKING:
    from psannlm.benchmarks.decoding.modes import Case, DecodeRun
    from psannlm.benchmarks.decoding.report import KvReport
    from psannlm.benchmarks.harness.interleaved import Progress, Spread

PLOT_FILE = "decode.png"
_TIME_LIMIT_S = 100.0
_SIZES = ("base", "d_model", "n_layers", "n_heads", "positional_encoding", "vocab_size")


def bench_kv(
    context: typer.Context,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts.")] = 8,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 96,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to add to each.")] = 64,
    base: Annotated[str, typer.Option(help="respsann, waveresnet or transformer.")] = "waveresnet",
    d_model: Annotated[int, typer.Option(help="Width.")] = 512,
    n_layers: Annotated[int, typer.Option(help="Blocks.")] = 8,
    n_heads: Annotated[int, typer.Option(help="Attention heads.")] = 8,
    positional_encoding: Annotated[str, typer.Option(help="rope, alibi or sinusoidal.")] = "rope",
    vocab_size: Annotated[int, typer.Option(help="Rows of the embedding.")] = 4096,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", "-c", help="A trained model, and its sizes, instead of random weights."),
    ] = None,
    dtype: DtypeOption = "float32",
    is_compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Measure the compiled engine too, beside the plain one.")
    ] = False,
    cases: Annotated[
        str, typer.Option(help="all; batch: no rows one by one; cached: no decoding without the cache.")
    ] = "all",
    uncached_steps: Annotated[
        int | None,
        typer.Option(min=2, help="Full forward passes to time after the first token, evenly. Default: all."),
    ] = None,
    context_growth: Annotated[
        bool, typer.Option("--context-growth/--no-context-growth", help="Time a step at contexts of 256 to 4,096.")
    ] = True,
    against: Annotated[
        str | None, typer.Option(help="transformers: a Llama of equal size beside ours (needs the extra hf).")
    ] = None,
    device: DeviceOption = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Counted runs of each case; the median is shown.")] = 3,
    time_limit: Annotated[
        float | None,
        typer.Option(
            metavar="DURATION",
            parser=duration_s,
            help="Leave out passes without the cache, repeats and contexts that would take longer. Default: 100s, or "
            "no limit where --repeats or --uncached-steps is given.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides random weights and prompts.")] = 1337,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for what is written.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time cached against naive decoding, in a batch and row by row, and check that no token changes."""
    given = [name for name in _SIZES if _is_given(context, name)]
    if checkpoint is not None and given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise typer.BadParameter(f"the checkpoint has sizes of its own; leave out {options}", param_hint="--checkpoint")

    given_work = [name for name in ("repeats", "uncached_steps") if _is_given(context, name)]
    from psannlm.benchmarks.decoding.bench import bench_kv as measure
    from psannlm.benchmarks.decoding.bench import build_random_model
    from psannlm.benchmarks.decoding.context_length import CONTEXTS, draw_growth
    from psannlm.benchmarks.decoding.report import KvSettings
    from psannlm.config.model import ModelConfig
    from psannlm.config.run import section_from_kwargs
    from psannlm.errors import LimitMissed
    from psannlm.io.run_metadata import require_folder
    from psannlm.models.artifact import load_model
    from psannlm.runtime.device import pick_device, require_compiler

    settings = KvSettings(
        batch_size=batch_size,
        prompt_length=prompt_length,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        seed=seed,
        dtype=dtype,
        is_compiled=is_compiled,
        cases=cases,  # type: ignore[arg-type]  # they say themselves what they take
        uncached_steps=uncached_steps,
        contexts=CONTEXTS if context_growth else (),
        against=against,
        time_limit_s=_TIME_LIMIT_S if time_limit is None and not given_work else time_limit,
    )
    require_folder("kv_cache", out)
    chosen = pick_device(device)
    if is_compiled:
        require_compiler(chosen, "--compile", "leave it out")
    if checkpoint is None:
        sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "vocab_size": vocab_size}
        with naming_options("model"):
            config = section_from_kwargs(
                ModelConfig, "model", {"base": base, "positional_encoding": positional_encoding, **sizes}
            )
        model, weights = build_random_model(config, settings, chosen), "random"
    else:
        path = find_model_file(checkpoint, DEFAULT_RUNS)
        model, weights = load_model(path).model.to(chosen), str(path)
    kept = _Kept(out)
    try:
        with live_line(stderr_console()) as line:

            def show(event: Progress) -> None:
                kept.progress = event
                line.show(str(event))

            report = measure(model, settings, weights=weights, on_progress=show, on_partial=kept.keep)
    except KeyboardInterrupt:
        kept.end()
        raise

    def draw(folder: Path) -> None:
        if report.growth:
            draw_growth(folder / PLOT_FILE, _plot_title(report), report.growth)

    if not as_json:
        for notice in report.notices:
            note(notice)
    publish("kv_cache", out, report.as_dict(), _tables(report), as_json, draw=draw, folder=kept.folder)
    if report.problems:
        raise LimitMissed("; ".join(report.problems))


class _Kept:
    """What was measured so far, on disk after every run: a benchmark that is ended early leaves it behind."""

    def __init__(self, out: Path | None) -> None:
        self._out = out
        self._figures: dict[str, Any] = {"is_complete": False}
        self.progress: Progress | None = None

    @cached_property
    def folder(self) -> Path:
        """The folder, made when there is something to write."""
        from psannlm.io.run_metadata import new_folder, system_info, write_json

        folder = new_folder("kv_cache", self._out)
        write_json(folder / "system.json", system_info())
        return folder

    def keep(self, figures: dict[str, Any]) -> None:
        """Write the figures so far."""
        from psannlm.io.run_metadata import write_json

        self._figures = figures
        write_json(self.folder / "metrics.json", figures)

    def end(self) -> None:
        """Write what was under way as well, and a table, and print where they are."""
        from psannlm.io.atomic import write_text

        rows = [
            (case["name"], f"{_number(case['tokens_per_s']['median'])} tokens/s{', a warm-up' * case['is_warm_up']}")
            for case in self._figures.get("cases", [])
        ]
        if "cached_over_naive" in self._figures:
            rows.append(
                ("cached over naive", f"{_number(self._figures['cached_over_naive']['median'])} x the tokens/s")
            )
        if self.progress is not None:
            rows.append(("interrupted in", str(self.progress)))
            self._figures["interrupted_in"] = asdict(self.progress)
        self.keep(self._figures)
        table = figures_table("decoding, interrupted: what was measured until then", rows)
        write_text(self.folder / "table.txt", table_text(table))
        stdout_console().print(table)
        print_path(f"written to {self.folder}")


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether a person wrote the option, rather than its default standing in for it."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _tables(report: KvReport) -> list[Table]:
    tables = [_cases_table(report), figures_table("what it comes to", _rows(report)), _roofline_table(report)]
    return [*tables, _growth_table(report)] if report.growth else tables


def _cases_table(report: KvReport) -> Table:
    settings, model = report.settings, report.model
    table = _open_table(
        f"decoding: {model.base}, {report.parameters / 1e6:,.1f}M parameters ({report.weights} weights), "
        f"{settings.dtype}, {report.device}; {settings.batch_size} prompt{'' if settings.batch_size == 1 else 's'} of "
        f"{settings.prompt_length:,} tokens, "
        f"{settings.max_new_tokens:,} new; {_runs_made(report)}",
        *("case", "prefill\nms", "first token\nms", "decode\ntokens/s", "whole\ntokens/s"),
    )
    for case, runs in report.runs.items():
        _add_runs(table, _name(case), runs)
    if report.reference_model is not None:
        _add_runs(table, report.reference_model.name, report.reference_model.runs)
    notes = []
    if any(not case.is_batched for case in report.runs):
        notes.append("row by row: prefill of all rows, first token each from its own start")
    if report.n_uncached_passes < settings.max_new_tokens and any(not case.use_cache for case in report.runs):
        notes.append(
            f"cache off: {report.n_uncached_passes} of {settings.max_new_tokens} passes of a row timed, evenly over "
            "the tokens; the seconds of the others are interpolated"
        )
    table.caption = "\n".join(notes)
    return table


def _runs_made(report: KvReport) -> str:
    counts = sorted({len(runs) for runs in report.runs.values()})
    if counts[-1] == 1:
        return "one run of each case"
    of = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} runs"
    return f"medians of {of}, under them the lowest and highest"


def _add_runs(table: Table, name: str, runs: list[DecodeRun]) -> None:
    from psannlm.benchmarks.harness.interleaved import Spread

    figures = (
        [1e3 * run.prefill_s for run in runs],
        [1e3 * run.first_token_s for run in runs],
        [run.decode_tokens_per_s for run in runs],
        [run.tokens_per_s for run in runs],
    )
    table.add_row(name, *(_spread(Spread.of(values), is_cell=True) for values in figures))


def _rows(report: KvReport) -> list[tuple[str, str]]:
    ratios = [
        ("the cache alone, in a batch", report.from_cache(True)),
        ("the cache alone, one row", report.from_cache(False)),
        ("batching alone, with cache", report.from_batching(True)),
        ("the same, compiled", report.from_batching(True, True)),
        ("batching alone, without", report.from_batching(False)),
        ("compiling alone, in a batch", report.from_compiling(True)),
        ("compiling alone, one row", report.from_compiling(False)),
    ]
    rows = _headline(report)
    rows += [(name, f"{_spread(ratio)} x the decode rate") for name, ratio in ratios if ratio is not None]
    for case, seconds in report.compile_s().items():
        rows.append((f"compilation, {_rows_of(case.is_batched)}", f"{seconds:,.1f} s, once"))
    if report.reference_model is not None:
        ratio = report.over_reference_model()
        rows += [
            ("reference model", report.reference_model.description),
            ("our parameters", f"{report.parameters:,}; {report.settings.dtype}; {report.ours}"),
            ("ours over the reference_model, whole", f"{_spread(ratio['whole'])} x the tokens/s"),
            ("ours over the reference_model, decode", f"{_spread(ratio['decode'])} x the tokens/s after the first"),
            ("the reference model's first run", f"{report.reference_model.first_s:,.1f} s, compilation included"),
        ]
    if report.packing is not None:
        cost = report.packing
        rows.append(
            (
                f"perplexity, {report.settings.dtype}",
                f"{cost.ratio:.5f} ± {cost.ratio_error:.5f} x that of float32 ({cost.packed_perplexity:,.2f} against "
                f"{cost.perplexity:,.2f}, on {cost.n_tokens:,} tokens that the float32 model drew)",
            )
        )
    predictions = report.predicted_cache_bytes()
    for case, measured in report.measured_cache_bytes().items():
        predicted = predictions[case]
        verdict = "as predicted" if measured == predicted else f"predicted: {predicted:,}"
        if not case.is_compiled or measured != predicted:
            rows.append((f"cache bytes, {_rows_of(case.is_batched)}", f"{measured:,} ({verdict})"))
    return [*rows, ("tokens out", _agreement(report))]


def _headline(report: KvReport) -> list[tuple[str, str]]:
    """The rate of the cached batch, that of the naive loop, and their quotient."""
    from psannlm.benchmarks.decoding.modes import Case
    from psannlm.benchmarks.harness.interleaved import Spread

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
            ("naive, row by row", f"{rate(report.naive)}: the whole prompt replayed for every token of every row"),
            ("cached over naive", f"{_spread(ratio)} x the tokens/s"),
        ]
    return rows


def _roofline_table(report: KvReport) -> Table:
    table = _open_table(
        "a decoding step beside its floor: the time in which memory delivers the weights and the cache that it reads, "
        "at the rate measured here",
        *("case", "step\nms", "reads\nMB", "memory\nGB/s", "floor\nms", "floor\n/ step"),
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
            f"the same in all cases but for {agreement.tied_places:,} ties of rounding: logits up to "
            f"{agreement.largest_tie:.2g} apart (a tie is up to {agreement.largest_tolerance:.2g})"
        )
    else:
        text = "the same in all cases"
    return f"{text}; {agreement.n_checked:,} compared, {report.distinct_tokens:,} different ids"


def _growth_table(report: KvReport) -> Table:
    settings = report.settings
    engine = f"{settings.dtype}{', compiled' if report.ours.is_compiled else ''}"
    table = _open_table(
        f"a cached step of {settings.batch_size} rows as the context grows, {engine}; the floor is the time to read "
        "weights and cache once",
        *("context", "step\nms", "floor\nms", "floor\n/ step", "tokens/s", "cache\nMB"),
    )
    for point in report.growth:
        roofline = point.roofline
        table.add_row(
            f"{point.context:,}",
            _spread(roofline.step_s, scale=1e3, is_cell=True),
            f"{1e3 * roofline.roofline_s:,.2f}",
            _spread(roofline.fraction, is_cell=True, is_percent=True),
            f"{settings.batch_size / roofline.step_s.median:,.0f}",
            f"{point.cache_bytes / 1e6:,.1f}",
        )
    if report.left_out:
        contexts = ", ".join(f"{context:,}" for context in report.left_out)
        table.caption = f"left out, for the model's context ends at {report.model.max_seq_len:,}: {contexts}"
    return table


def _plot_title(report: KvReport) -> str:
    settings = report.settings
    rows = f"{settings.batch_size} row{'' if settings.batch_size == 1 else 's'}"
    engine = f"{settings.dtype}{', compiled' if report.ours.is_compiled else ''}"
    return f"Decoding with the cache: {report.model.base}, {report.parameters / 1e6:,.1f}M, {engine}, {rows}"


def _open_table(title: str, first: str, *headings: str) -> Table:
    """A table without vertical rules, which would take the room of the figures in 80 columns."""
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left", box=box.SIMPLE_HEAD)
    table.padding = (0, 1)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _name(case: Case) -> str:
    return str(case).replace(", compiled", ",\ncompiled")


def _rows_of(is_batched: bool) -> str:
    return "batch" if is_batched else "one row"


def _spread(spread: Spread, *, scale: float = 1.0, is_cell: bool = False, is_percent: bool = False) -> str:
    low, middle, high = (value * scale for value in (spread.lowest, spread.median, spread.highest))
    tell = _percent if is_percent else _number
    edges = f"{tell(low)}–{tell(high)}"
    return f"{tell(middle)}\n{edges}" if is_cell else f"{tell(middle)} ({edges})"


def _percent(value: float) -> str:
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def _number(value: float) -> str:
    """Three digits or more, in at most six characters below ten million."""
    if value >= 1e4:
        return f"{value / 1e3:,.1f}k" if value < 1e5 else f"{value / 1e3:,.0f}k"
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"

"""psannlm bench-kv: sizes of a model and a batch to what the cache and batching are worth in decoding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from psannlm.commands.options import (
    DeviceOption,
    JsonOption,
    figures_table,
    live_line,
    naming_options,
    print_json,
    progress,
    results,
    table_text,
)

if TYPE_CHECKING:
    from psannlm.benchmarks.kv_cache import KvReport
    from psannlm.benchmarks.timing import Spread


def bench_kv(
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts.")] = 8,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 96,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to add to each.")] = 64,
    base: Annotated[str, typer.Option(help="respsann, waveresnet or transformer.")] = "waveresnet",
    d_model: Annotated[int, typer.Option(help="Width.")] = 512,
    n_layers: Annotated[int, typer.Option(help="Blocks.")] = 8,
    n_heads: Annotated[int, typer.Option(help="Attention heads.")] = 8,
    positional_encoding: Annotated[str, typer.Option(help="rope, alibi or sinusoidal.")] = "rope",
    vocab_size: Annotated[int, typer.Option(help="Rows of the embedding.")] = 4096,
    device: DeviceOption = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Counted runs of each case; the median is shown.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Decides weights and prompts.")] = 1337,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for what is written.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time cached against naive decoding, in a batch and row by row, and check that no token changes."""
    from psannlm.benchmarks.kv_cache import KvSettings
    from psannlm.benchmarks.kv_cache import bench_kv as measure
    from psannlm.config.model import ModelConfig
    from psannlm.config.run import section_from_kwargs
    from psannlm.device import pick_device
    from psannlm.errors import LimitMissed
    from psannlm.reports.store import new_folder, system_info, write_json
    from psannlm.storage import write_text

    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "vocab_size": vocab_size}
    with naming_options("model"):
        config = section_from_kwargs(
            ModelConfig, "model", {"base": base, "positional_encoding": positional_encoding, **sizes}
        )
    settings = KvSettings(batch_size, prompt_length, max_new_tokens, repeats, seed)
    with live_line(progress()) as line:
        report = measure(
            config, settings, device=pick_device(device), on_standing=lambda standing: line.show(str(standing))
        )
    tables = _cases_table(report), figures_table("what it comes to", _rows(report))
    folder = new_folder("kv_cache", out)
    metrics = report.as_dict()
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "system.json", system_info())
    write_text(folder / "table.txt", table_text(*tables))
    if as_json:
        print_json({**metrics, "folder": str(folder)})
    else:
        results().print(*tables, sep="\n")
        results().print(f"written to {folder}", highlight=False, markup=False)
    if report.problems:
        raise LimitMissed("; ".join(report.problems))


def _cases_table(report: KvReport) -> Table:
    from psannlm.benchmarks.decoding import CASES
    from psannlm.benchmarks.timing import Spread

    settings, model = report.settings, report.model
    table = Table(
        title=f"decoding: {model.base}, {report.parameters / 1e6:,.1f}M parameters, float32, {report.device}; "
        f"{settings.batch_size} prompts of {settings.prompt_length} tokens, {settings.max_new_tokens} new; "
        f"medians of {settings.repeats}",
        title_justify="left",
        title_style="bold",
        caption="under the median, the lowest and highest",
        caption_justify="left",
    )
    table.add_column("case", no_wrap=True)
    for heading in ("prefill, ms", "first token, ms", "decode, tokens/s", "all, s"):
        table.add_column(heading, justify="right", overflow="fold")
    for case in CASES:
        runs = report.runs[case]
        table.add_row(
            str(case),
            _spread(Spread.of([1e3 * run.prefill_s for run in runs]), is_cell=True),
            _spread(Spread.of([1e3 * run.first_token_s for run in runs]), is_cell=True),
            _spread(report.rate(case), is_cell=True),
            _spread(Spread.of([run.total_s for run in runs]), is_cell=True),
        )
    return table


def _rows(report: KvReport) -> list[tuple[str, str]]:
    rows = [
        ("the cache alone, in a batch", f"{_spread(report.from_cache(True))} x the decode rate"),
        ("the cache alone, one row", f"{_spread(report.from_cache(False))} x the decode rate"),
        ("batching alone, with cache", f"{_spread(report.from_batching(True))} x the decode rate"),
        ("batching alone, without", f"{_spread(report.from_batching(False))} x the decode rate"),
    ]
    for case, measured in report.measured_cache_bytes.items():
        predicted = report.predicted_cache_bytes[case]
        verdict = "as predicted" if measured == predicted else f"predicted: {predicted:,}"
        rows.append((f"cache bytes, {'batch' if case.is_batched else 'one row'}", f"{measured:,} ({verdict})"))
    equal = "the same in all cases" if report.difference is None else str(report.difference)
    rows.append(("tokens out", f"{equal}; {report.distinct_tokens:,} different ids"))
    return rows


def _spread(spread: Spread, *, is_cell: bool = False) -> str:
    digits = 3 if spread.median < 1 else 2 if spread.median < 100 else 0
    edges = f"{spread.lowest:,.{digits}f}–{spread.highest:,.{digits}f}"
    return f"{spread.median:,.{digits}f}" + (f"\n{edges}" if is_cell else f" ({edges})")

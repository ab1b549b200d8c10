"""psannlm bench-train: sizes of a model and a batch to how fast it trains, beside a reference model of equal size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.table import Table

from psannlm.commands.options import (
    DeviceOption,
    JsonOption,
    figures_table,
    live_line,
    naming_options,
    publish,
    stderr_console,
)

if TYPE_CHECKING:
    from psannlm.benchmarks.harness.interleaved import Spread
    from psannlm.benchmarks.training.report import ThroughputReport

PLOT_FILE = "throughput.png"


def bench_train(
    base: Annotated[str, typer.Option(help="respsann, waveresnet or transformer.")] = "waveresnet",
    d_model: Annotated[int, typer.Option(help="Width.")] = 256,
    n_layers: Annotated[int, typer.Option(help="Blocks.")] = 4,
    n_heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    vocab_size: Annotated[int, typer.Option(help="Rows of the embedding.")] = 4096,
    positional_encoding: Annotated[str, typer.Option(help="rope, alibi or sinusoidal.")] = "rope",
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 256,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = 4096,
    amp: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help="Precision of matrix products; auto probes.")
    ] = "auto",
    is_compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="torch.compile every candidate, the reference model too.")
    ] = False,
    grad_checkpoint: Annotated[
        bool, typer.Option("--grad-checkpoint/--no-grad-checkpoint", help="Recompute activations, in every candidate.")
    ] = False,
    optimizer: Annotated[Literal["adamw", "muon"], typer.Option(help="Of every candidate.")] = "adamw",
    also: Annotated[
        list[str] | None,
        typer.Option(
            help="grad-checkpoint, gelu or silu (in the sine's place), transformer (of equal size) or compile, beside "
            "ours; may be repeated."
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="transformers: a Llama of equal size beside ours (needs the extra hf).")
    ] = None,
    measures_memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure peak memory, each candidate in its own process.")
    ] = True,
    device: DeviceOption = "auto",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of a turn. Default: about a second of the fastest candidate.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Counted turns of each candidate; the median is shown.")] = 5,
    warmup: Annotated[int, typer.Option(min=1, help="Steps of each after its first that do not count.")] = 2,
    clock: Annotated[
        Literal["wall", "cpu"],
        typer.Option(help="cpu: seconds of this process's threads; with one thread, a fair clock on a shared machine."),
    ] = "wall",
    seed: Annotated[int, typer.Option(min=0, help="Decides weights and tokens.")] = 1337,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for what is written.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time training steps, in turns with variants and a reference model, and measure how much memory they take."""
    import time

    from psannlm.benchmarks.training.bench import bench_train as measure
    from psannlm.benchmarks.training.candidates import ThroughputSettings
    from psannlm.benchmarks.training.peak_memory import peak_step_bytes
    from psannlm.benchmarks.training.report import draw_throughput
    from psannlm.config.model import ModelConfig
    from psannlm.config.run import section_from_kwargs
    from psannlm.errors import LimitMissed
    from psannlm.io.run_metadata import require_folder, timestamp
    from psannlm.models.registry import resolve
    from psannlm.runtime.device import pick_device
    from psannlm.runtime.malloc import retain_freed_memory

    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "vocab_size": vocab_size}
    with naming_options("model"):
        config = section_from_kwargs(
            ModelConfig, "model", {"base": base, "positional_encoding": positional_encoding, **sizes}
        )
    settings = ThroughputSettings(
        model=resolve(config, max_seq_len=seq_len),
        seq_len=seq_len,
        batch_tokens=batch_tokens,
        amp=amp,
        is_compiled=is_compiled,
        grad_checkpoint=grad_checkpoint,
        optimizer=optimizer,
        steps=steps,
        repeats=repeats,
        warmup=warmup,
        seed=seed,
        also=tuple(also or ()),  # type: ignore[arg-type]  # they say themselves what they take
        against=against,
    )
    require_folder("throughput", out)
    retain_freed_memory()
    chosen = pick_device(device)
    with live_line(stderr_console()) as line:
        report = measure(
            settings,
            chosen,
            measure_memory=peak_step_bytes if measures_memory else None,
            clock=time.process_time if clock == "cpu" else time.perf_counter,
            on_progress=lambda event: line.show(str(event)),
        )
    tables = [_rates_table(report, clock), figures_table("what it comes to", _rows(report))]
    metrics: dict[str, Any] = {**report.as_dict(timestamp()), "clock": clock}

    def draw(folder: Path) -> None:
        draw_throughput(folder / PLOT_FILE, _title(report), report)

    publish("throughput", out, metrics, tables, as_json, draw=draw)
    if report.problems:
        raise LimitMissed("; ".join(report.problems))


def _title(report: ThroughputReport) -> str:
    settings, model = report.settings, report.settings.model
    return (
        f"training: {model.base}, d {model.d_model} x {model.n_layers} layers, vocabulary {model.vocab_size:,}, "
        f"{settings.tokens_per_step // settings.seq_len} x {settings.seq_len} tokens, {settings.optimizer}, "
        f"{report.precision.split()[0].rstrip(':')}"
    )


def _rates_table(report: ThroughputReport, clock: str) -> Table:
    table = Table(
        title=f"{_title(report)}; {report.device}; medians of {report.settings.repeats} turns of "
        f"{report.steps_per_turn} steps, under them the lowest and highest",
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
    )
    table.add_column("", min_width=14)
    for heading in (
        "tokens/s",
        "fraction of\nmatrix peak",
        "step\nms",
        "first step\ns",
        "peak\nMB",
        "ours over it\nspeed",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report.rows:
        rate, utilisation, ratio = report.tokens_per_s(row), report.utilisation(row), report.speed_of_ours_over(row)
        step_ms = 1e3 * report.settings.tokens_per_step / rate.median
        table.add_row(
            row.name,
            f"{rate.median:,.0f}\n{rate.lowest:,.0f}–{rate.highest:,.0f}",
            f"{utilisation.median:.0%}",
            f"{step_ms:,.1f}",
            f"{row.first_step_s:,.2f}",
            "–" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}",
            f"{ratio.median:.2f}\n{ratio.lowest:.2f}–{ratio.highest:.2f}",
        )
    from psannlm.benchmarks.harness.interleaved import Spread

    peak = Spread.of(report.matrix_flops_per_s)
    table.caption = (
        f"matrix peak: {peak.median / 1e9:,.0f} GFLOP/s ({peak.lowest / 1e9:,.0f}–{peak.highest / 1e9:,.0f}), "
        f"measured in the same turns; {report.precision}"
    )
    if clock == "cpu":
        table.caption += "; seconds are those of the process, not of the clock on the wall"
    return table


def _rows(report: ThroughputReport) -> list[tuple[str, str]]:
    ours = report.ours
    rows = [("our parameters", f"{ours.parameters:,}; {ours.flops_per_token / 1e6:,.1f} MFLOP per token")]
    for row in report.rows[1:]:
        ratio, memory = report.speed_of_ours_over(row), report.memory_of_ours_over(row)
        text = f"{_spread(ratio)} x the tokens/s"
        if memory is not None:
            text += f", {memory:.2f} x the peak memory"
        rows.append((f"ours over {row.name}", text))
        if row.candidate.maker != "psannlm" and not row.candidate.is_compiled:
            rows.append(("reference model", row.description))
    for is_compiled, words in ((False, "plain"), (True, "compiled")):
        cost = report.sine_cost(is_compiled)
        if cost is not None:
            edges = f"{cost.lowest:+.1%} to {cost.highest:+.1%}"
            rows.append((f"the sine over GELU, {words}", f"{cost.median:+.1%} seconds a step ({edges})"))
    return rows


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.lowest:.2f}–{spread.highest:.2f})"

"""psannlm bench-train: training throughput and peak memory, beside a reference model of equal size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from psannlm.commands.options import (
    BaseOption,
    DeviceOption,
    HeadsOption,
    JsonOption,
    LayersOption,
    PositionsOption,
    VocabularyOption,
    WidthOption,
    figures_table,
    live_line,
    model_config,
    open_table,
    publish,
    stderr_console,
)

if TYPE_CHECKING:
    from psannlm.benchmarks.training.report import ThroughputReport
    from psannlm.reports.schemas.measured import Spread

PLOT_FILE = "throughput.png"


AmpOption = Annotated[
    Literal["auto", "bf16", "fp16", "fp32"],
    typer.Option("--amp", help="Precision of matrix products; auto takes bf16 where the hardware has it."),
]
CompileOption = Annotated[
    bool,
    typer.Option("--compile/--no-compile", help="Compile every candidate and the reference model (torch.compile)."),
]
GradCheckpointOption = Annotated[
    bool,
    typer.Option("--grad-checkpoint/--no-grad-checkpoint", help="Recompute activations in every candidate's backward."),
]
AlsoOption = Annotated[
    list[str] | None,
    typer.Option(
        "--also",
        help="Train a further candidate: ours with grad-checkpoint, with gelu or silu instead of the sine, or compiled "
        "(compile), or a transformer of equal size; may be repeated.",
    ),
]
TrainedAgainstOption = Annotated[
    list[str] | None,
    typer.Option(
        "--against",
        help="Reference model of equal size: transformers, for its Llama (needs the extra hf), or pytorch, a GPT in "
        "plain PyTorch; may be repeated.",
    ),
]
StepsOption = Annotated[
    int | None,
    typer.Option(
        "--steps", min=1, help="Training steps in each timed run; default: about one second of the fastest candidate."
    ),
]
RepeatsOption = Annotated[
    int, typer.Option("--repeats", min=1, help="Number of timed runs of each candidate; the median is reported.")
]
ClockOption = Annotated[
    Literal["wall", "cpu"],
    typer.Option(
        "--clock",
        help="wall measures elapsed seconds; cpu the CPU seconds of this process, for one thread on a shared machine.",
    ),
]


def bench_train(
    base: BaseOption = "waveresnet",
    d_model: WidthOption = 256,
    n_layers: LayersOption = 4,
    n_heads: HeadsOption = 4,
    vocab_size: VocabularyOption = 4096,
    positional_encoding: PositionsOption = "rope",
    seq_len: Annotated[int, typer.Option(min=1, help="Length of a training window, in tokens.")] = 256,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Number of tokens in a training step.")] = 4096,
    amp: AmpOption = "auto",
    is_compiled: CompileOption = False,
    grad_checkpoint: GradCheckpointOption = False,
    optimizer: Annotated[Literal["adamw", "muon"], typer.Option(help="Optimizer of every candidate.")] = "adamw",
    also: AlsoOption = None,
    against: TrainedAgainstOption = None,
    measures_memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure peak memory, each candidate in its own process.")
    ] = True,
    device: DeviceOption = "auto",
    steps: StepsOption = None,
    repeats: RepeatsOption = 5,
    warmup: Annotated[int, typer.Option(min=1, help="Number of warm-up steps of each candidate after its first.")] = 2,
    clock: ClockOption = "wall",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random weights and tokens.")] = 1337,
    out: Annotated[
        Path | None, typer.Option("--out", help="Output folder; default: reports/throughput/<time>.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure training throughput and peak memory beside model variants and a reference model of equal size."""
    import time

    from psannlm.benchmarks.training.bench import bench_train as measure
    from psannlm.benchmarks.training.candidates import ThroughputSettings
    from psannlm.benchmarks.training.peak_memory import peak_step_bytes
    from psannlm.benchmarks.training.report import draw_throughput
    from psannlm.errors import LimitMissed
    from psannlm.io.run_metadata import require_folder, timestamp
    from psannlm.models.registry import resolve
    from psannlm.runtime.device import pick_device
    from psannlm.runtime.malloc import retain_freed_memory

    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "vocab_size": vocab_size}
    config = model_config(base=base, positional_encoding=positional_encoding, **sizes)
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
        also=tuple(also or ()),  # type: ignore[arg-type]  # the settings check the names themselves
        against=tuple(against or ()),
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
            on_progress=line.show,
        )
    tables = [_throughput_table(report, clock), figures_table("summary", _summary(report))]
    metrics = report.metrics(timestamp(), clock).as_dict()

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


def _throughput_table(report: ThroughputReport, clock: str) -> Table:
    table: Table = open_table(
        f"{_title(report)}; {report.device}; medians of {report.settings.repeats} runs of "
        f"{report.steps_per_run} steps, with the lowest and highest run below"
    )
    table.add_column("", min_width=14)
    for heading in (
        "tokens/s",
        "fraction of\nmatrix peak",
        "step\nms",
        "first step\ns",
        "peak\nMB",
        "our speedup",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report.rows:
        throughput, utilisation, ratio = (
            report.tokens_per_s(row),
            report.utilisation(row),
            report.speed_of_ours_over(row),
        )
        step_ms = 1e3 * report.settings.tokens_per_step / throughput.median
        table.add_row(
            row.name,
            f"{throughput.median:,.0f}\n{throughput.lowest:,.0f}–{throughput.highest:,.0f}",
            f"{utilisation.median:.0%}",
            f"{step_ms:,.1f}",
            f"{row.first_step_s:,.2f}",
            "–" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}",
            f"{ratio.median:.2f}\n{ratio.lowest:.2f}–{ratio.highest:.2f}",
        )
    from psannlm.reports.schemas.measured import Spread

    peak = Spread.of(report.matrix_flops_per_s)
    table.caption = (
        f"matrix peak: {peak.median / 1e9:,.0f} GFLOP/s ({peak.lowest / 1e9:,.0f}–{peak.highest / 1e9:,.0f}), "
        f"measured between the runs; {report.precision}"
    )
    if clock == "cpu":
        table.caption += "; seconds are CPU seconds of the process, not elapsed time"
    return table


def _summary(report: ThroughputReport) -> list[tuple[str, str]]:
    ours = report.ours
    rows = [("our parameters", f"{ours.parameters:,}; {ours.flops_per_token / 1e6:,.1f} MFLOP per token")]
    for row in report.rows[1:]:
        ratio, memory = report.speed_of_ours_over(row), report.memory_of_ours_over(row)
        text = f"{_spread(ratio)} x the throughput"
        if memory is not None:
            text += f", {memory:.2f} x the peak memory"
        rows.append((f"ours / {row.name}", text))
        if row.candidate.maker != "psannlm" and not row.candidate.is_compiled:
            rows.append(("reference model", row.description))
    for is_compiled, words in ((False, "plain"), (True, "compiled")):
        cost = report.sine_cost(is_compiled)
        if cost is not None:
            edges = f"{cost.lowest:+.1%} to {cost.highest:+.1%}"
            rows.append((f"cost of the sine vs GELU, {words}", f"{cost.median:+.1%} seconds per step ({edges})"))
    return rows


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.lowest:.2f}–{spread.highest:.2f})"

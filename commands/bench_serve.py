"""psannlm bench-serve: throughput and latency of the server under load, beside reference servers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from psannlm.commands.options import (
    DEFAULT_RUNS,
    BaseOption,
    DeviceOption,
    DtypeOption,
    HeadsOption,
    JsonOption,
    LayersOption,
    VocabularyOption,
    WidthOption,
    chosen_device,
    duration_s,
    figures_table,
    find_model_file,
    live_line,
    model_config,
    open_table,
    publish,
    refuse_sizes,
    stderr_console,
)

if TYPE_CHECKING:
    from psannlm.benchmarks.serving.load import Level
    from psannlm.benchmarks.serving.report import ServingSettings
    from psannlm.benchmarks.serving.servers import ServerSpec
    from psannlm.benchmarks.serving.subject import Subject
    from psannlm.reports.schemas.measured import Spread
    from psannlm.reports.schemas.serving import Percentiles, ServingMetrics, ServingRow, SoakFigures

_SOAK_REQUESTS = 10_000

CheckpointArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Model file, checkpoint folder or run folder to serve; default: random weights of the sizes below.",
    ),
]
ConcurrencyOption = Annotated[
    str, typer.Option("--concurrency", help="Numbers of clients, each of which has one request at a time.")
]
RateOption = Annotated[
    str | None,
    typer.Option(
        "--rate",
        help="Mean numbers of requests per second that arrive by a Poisson process, in place of --concurrency.",
    ),
]
RequestsOption = Annotated[
    int | None,
    typer.Option(
        "--requests", min=1, help="Number of requests of each load; default: 4 for each client, 64 with --rate."
    ),
]
SecondsOption = Annotated[
    float,
    typer.Option(
        "--seconds", metavar="DURATION", parser=duration_s, help="Time after which a load sends no further request."
    ),
]
TemperatureOption = Annotated[
    float, typer.Option(min=0.0, help="Temperature of sampling; 0 takes the most likely token.")
]
MaxBatchOption = Annotated[
    int, typer.Option(min=1, help="Number of requests that our server decodes together; the others wait.")
]
AgainstServersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--against",
        help="Reference server of the same weights: transformers (transformers serve), transformers-batched (the same "
        "with --continuous-batching) or llama.cpp (llama-cpp-python's server); may be repeated.",
    ),
]
CompileOption = Annotated[
    bool, typer.Option("--compile/--no-compile", help="Compile the decoding steps of our server (torch.compile).")
]
CheckOption = Annotated[
    int | None,
    typer.Option(
        "--check",
        min=0,
        help="Number of answers to compare with the engine's own, bit for bit; default: 16, and 500 with --soak.",
    ),
]
SoakOption = Annotated[
    bool,
    typer.Option(
        "--soak",
        help="Instead of the figures, send 10,000 requests (or --requests) at the largest --concurrency, among them "
        "clients that vanish, stall and send rubbish, and check answers, memory and the end.",
    ),
]


def bench_serve(
    context: typer.Context,
    checkpoint: CheckpointArgument = None,
    concurrency: ConcurrencyOption = "1,4,16,64",
    rate: RateOption = None,
    requests: RequestsOption = None,
    seconds: SecondsOption = "60s",  # type: ignore[assignment]  # parsed by duration_s
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Length of each prompt, in tokens.")] = 96,
    new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of new tokens of each request.")] = 64,
    temperature: TemperatureOption = 0.8,
    base: BaseOption = "transformer",
    d_model: WidthOption = 512,
    n_layers: LayersOption = 8,
    n_heads: HeadsOption = 8,
    vocab_size: VocabularyOption = 4096,
    dtype: DtypeOption = "float32",
    is_compiled: CompileOption = False,
    max_batch: MaxBatchOption = 16,
    against: AgainstServersOption = None,
    check: CheckOption = None,
    soak: SoakOption = False,
    device: DeviceOption = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Number of runs of each load; the median is reported.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, prompts, arrivals and sampling.")] = 1337,
    out: Annotated[Path | None, typer.Option("--out", help="Output folder; default: reports/serving/<time>.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure throughput and latency of the server under load, beside reference servers of the same weights."""
    if checkpoint is not None:
        refuse_sizes(context, "CHECKPOINT")
    if soak and (rate is not None or against):
        raise typer.BadParameter("a soak has clients, and only our server; leave out --rate and --against")

    import tempfile

    from psannlm.benchmarks.serving.bench import bench_serve as measure
    from psannlm.benchmarks.serving.bench import soak_server
    from psannlm.benchmarks.serving.report import ServingSettings
    from psannlm.benchmarks.serving.servers import require_servers
    from psannlm.errors import LimitMissed
    from psannlm.io.run_metadata import require_folder

    settings = ServingSettings(
        levels=_levels(concurrency, rate, only_largest=soak),
        n_requests=_SOAK_REQUESTS if soak and requests is None else requests,
        seconds=seconds,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        temperature=temperature,
        dtype=dtype,
        is_compiled=is_compiled,
        max_batch=max_batch,
        repeats=repeats,
        n_checked=(500 if soak else 16) if check is None else check,
        against=tuple(dict.fromkeys(against or ())),
        seed=seed,
    )
    require_folder("serving", out)
    require_servers(settings.against)
    chosen = chosen_device(device, is_compiled=is_compiled)
    sizes = {"base": base, "d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "vocab_size": vocab_size}
    with tempfile.TemporaryDirectory(prefix="psannlm-bench-serve-") as scratch, live_line(stderr_console()) as line:
        subject = _subject(checkpoint, sizes, settings, Path(scratch))
        specs = _specs(subject, settings, str(chosen), Path(scratch))
        if soak:
            report = soak_server(subject, specs[0], settings, device=str(chosen), on_progress=line.show)
        else:
            report = measure(
                subject,
                specs,
                settings,
                device=str(chosen),
                on_progress=line.show,
                on_interrupt=lambda partial: _publish(partial.metrics(), out, as_json) if partial.runs else None,
            )
    _publish(report.metrics(), out, as_json)
    if report.problems:
        raise LimitMissed("; ".join(report.problems))


def _publish(metrics: ServingMetrics, out: Path | None, as_json: bool) -> None:
    """Write figures, tables and plot, and print them."""
    from psannlm.reports.tables.serving import PLOT_FILE, serving_pictures

    def draw(folder: Path) -> None:
        from psannlm.io.atomic import write_bytes

        for picture in serving_pictures(metrics):
            write_bytes(folder / PLOT_FILE, picture.png)

    publish("serving", out, metrics.as_dict(), _tables(metrics), as_json, draw=draw)


def _levels(concurrency: str, rate: str | None, *, only_largest: bool) -> tuple[Level, ...]:
    """Return the levels of load, or only the largest. Raises BadParameter for anything but numbers above zero."""
    from psannlm.benchmarks.serving.load import Level

    text, option = (concurrency, "--concurrency") if rate is None else (rate, "--rate")
    parts = [part.strip() for part in text.split(",")]
    try:
        numbers = [int(part) if rate is None else float(part) for part in parts]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < 1e6 for number in numbers):
        example = "1,4,16,64" if rate is None else "0.5,2,8"
        raise typer.BadParameter(f"{text!r} is not a list of numbers above 0; write {example}", param_hint=option)
    unique = [max(numbers)] if only_largest else dict.fromkeys(numbers)
    return tuple(Level(concurrency=int(n)) if rate is None else Level(rate=float(n)) for n in unique)


def _subject(checkpoint: Path | None, sizes: dict[str, str | int], settings: ServingSettings, scratch: Path) -> Subject:
    """Return the model to serve: the checkpoint, or one of random weights."""
    from psannlm.benchmarks.serving.subject import build_subject, read_subject

    n_tokens = settings.prompt_tokens + settings.new_tokens
    if checkpoint is not None:
        return read_subject(find_model_file(checkpoint, DEFAULT_RUNS, hint="CHECKPOINT"), n_tokens)
    return build_subject(model_config(**sizes), n_tokens, settings.seed, scratch)


def _specs(subject: Subject, settings: ServingSettings, device: str, scratch: Path) -> list[ServerSpec]:
    """Return the servers to start: ours, and the reference servers of exports of the same weights."""
    import torch

    from psannlm.benchmarks.serving import servers
    from psannlm.benchmarks.serving.subject import export_folder, export_gguf_file

    most = max((level.concurrency or 0 for level in settings.levels), default=0)
    specs = [
        servers.ours(
            subject.file,
            dtype=settings.dtype,
            is_compiled=settings.is_compiled,
            max_batch=settings.max_batch,
            max_queue=max(
                64, 2 * most, 0 if settings.levels[0].rate is None else settings.requests_at(settings.levels[0])
            ),
            max_tokens=max(512, settings.new_tokens),
            device=device,
        )
    ]
    n_tokens = settings.prompt_tokens + settings.new_tokens
    shared = {"dtype": settings.dtype, "device": device}
    for name in settings.against:
        if name == "llama.cpp":
            file = export_gguf_file(subject, scratch / "gguf", settings.dtype)
            specs.append(servers.llama_cpp(file, n_context=max(256, n_tokens), threads=torch.get_num_threads()))
            continue
        folder = scratch / "hf"
        if not folder.exists():
            export_folder(subject, folder)
        if name == "transformers":
            specs.append(servers.transformers(folder, **shared))
        else:
            rows = 2 * settings.max_batch
            specs.append(servers.transformers_batched(folder, **shared, n_rows=rows, n_tokens=n_tokens))
    return specs


def _tables(metrics: ServingMetrics) -> list[Table]:
    summary = figures_table("summary", _summary(metrics))
    return [_rows_table(metrics), summary] if metrics.rows else [summary]


def _rows_table(metrics: ServingMetrics) -> Table:
    engine = f"{metrics.dtype}{', compiled' if metrics.is_compiled else ''}"
    table: Table = open_table(
        f"serving: {metrics.model['base']}, {metrics.parameters / 1e6:,.1f}M parameters ({metrics.weights} weights), "
        f"{engine}, {metrics.device}; prompts of {metrics.prompt_tokens:,} tokens, {metrics.new_tokens:,} new; "
        f"{'one run' if metrics.repeats == 1 else f'medians of {metrics.repeats} runs'} of each load",
        *("server and load", "requests\nfailed", "tokens/s", "first token, ms\np50 / p95 / p99"),
        *("between parts, ms\np50 / p95 / p99", "memory\nMB"),
        caption="throughput with the lowest and highest run below; a part of a text is what an event adds to it"
        + ("" if metrics.is_complete else "; interrupted: figures so far"),
    )
    for row in metrics.rows:
        table.add_row(
            f"{row.server}\n{row.level}",
            f"{row.requests:,}\n{row.failed:,}",
            "–" if row.tokens_per_s is None else _spread_cell(row),
            _milliseconds(row.first_token_s),
            _milliseconds(row.between_tokens_s),
            "–" if row.resident_bytes is None else f"{row.resident_bytes / 1e6:,.0f}",
        )
    return table


def _summary(metrics: ServingMetrics) -> list[tuple[str, str]]:
    rows = [(server.name, f"{server.description}; ready in {server.ready_s:,.1f} s") for server in metrics.servers]
    if metrics.engine_batch is not None:
        batch = metrics.engine_batch
        rows.append(
            (f"engine, batch of {batch.batch_size}", f"{_spread(batch.tokens_per_s)} tokens/s without a server")
        )
        if batch.served_over_it is not None:
            rows.append(("served / engine", f"{_spread(batch.served_over_it)} x its throughput"))
    rows += [
        (f"{name} / 1 client", f"{_spread(ratio)} x the throughput") for name, ratio in metrics.over_one_client.items()
    ]
    for row in metrics.rows:
        if row.our_tokens_per_s_over_its is not None:
            text = f"{_spread(row.our_tokens_per_s_over_its)} x the throughput"
            if row.our_first_token_p95_over_its is not None:
                text += f", {_spread(row.our_first_token_p95_over_its)} x the time to the first token (p95)"
            rows.append((f"ours / {row.server}, {row.level}", text))
        for reason, count in row.failures.items():
            rows.append((f"failed, {row.server}, {row.level}", f"{count:,} x {reason}"))
    rows += [] if metrics.soak is None else _soak_rows(metrics.soak)
    if metrics.check is not None:
        check = metrics.check
        verdict = "all equal to the engine's own, bit for bit" if not check.wrong else f"{check.wrong:,} wrong"
        rows.append(("answers compared", f"{check.compared:,}: {verdict}"))
    return rows


def _soak_rows(soak: SoakFigures) -> list[tuple[str, str]]:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(soak.kinds.items()))
    rows = [
        ("soak", f"{soak.requests:,} requests in {soak.seconds:,.0f} s at concurrency {soak.concurrency}: {kinds}"),
        ("answered, lost", f"{soak.answered:,}, {soak.lost:,}"),
        ("rubbish not refused", f"{soak.unrefused:,}"),
    ]
    rows += [("lost", f"{count:,} x {reason}") for reason, count in soak.lost_for.items()]
    rows += [("not refused", f"{count:,} x {what}") for what, count in soak.unrefused_with.items()]
    if soak.memory_growth is not None:
        first, last = soak.resident_bytes[0] / 1e6, soak.resident_bytes[-1] / 1e6
        rows.append(("memory", f"{soak.memory_growth:+.1%} after the first fifth; {first:,.0f} to {last:,.0f} MB"))
    return rows


def _spread_cell(row: ServingRow) -> str:
    spread = row.tokens_per_s
    assert spread is not None
    return f"{_number(spread.median)}\n{_number(spread.lowest)}–{_number(spread.highest)}"


def _spread(spread: Spread) -> str:
    return f"{_number(spread.median)} ({_number(spread.lowest)}–{_number(spread.highest)})"


def _milliseconds(found: Percentiles | None) -> str:
    if found is None:
        return "–"
    return " / ".join(_number(1e3 * spread.median) for spread in (found.p50, found.p95, found.p99))


def _number(value: float) -> str:
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"

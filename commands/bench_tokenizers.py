"""psannlm bench-tokenizers: speed, memory and compression of tokenizer backends on held-out text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from psannlm.commands.options import (
    JsonOption,
    PerLineOption,
    TextKeyOption,
    live_line,
    publish,
    require_existing,
    stderr_console,
)

if TYPE_CHECKING:
    from psannlm.reports.schemas.measured import Spread
    from psannlm.reports.schemas.tokenizers import PrepFigures, Speed, TokenizerFigures, TokenizerReport

CorpusOption = Annotated[
    list[str] | None,
    typer.Option("--corpus", help="Corpus file, folder or glob; may be repeated. Default: Python's reference manual."),
]
CorpusRepeatOption = Annotated[
    int,
    typer.Option(
        "--corpus-repeat",
        min=1,
        help="Number of copies of the text, made after the split, so that a small corpus can be timed.",
    ),
]
EngineOption = Annotated[
    Literal["local", "ray"],
    typer.Option("--engine", help="With --prep: ray times prep on a Ray cluster of this machine too, beside local."),
]


def bench_tokenizers(
    corpus: CorpusOption = None,
    held_out: Annotated[
        str | None, typer.Option("--held-out", help="Held-out text to measure on; default: about 10% of the corpus.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Maximum vocabulary size of the trained tokenizers.")] = 4096,
    corpus_repeat: CorpusRepeatOption = 1,
    repeats: Annotated[
        int, typer.Option("--repeats", "--repeat", min=1, help="Number of timed runs of each; the median is reported.")
    ] = 3,
    model: Annotated[
        list[Path] | None, typer.Option("--model", help="Further tokenizer file to measure; may be repeated.")
    ] = None,
    sample_chars: Annotated[
        int | None,
        typer.Option(min=1, help="Number of characters to train on, sampled from the corpus; default: 8,000,000."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling and of the held-out split.")] = 1337,
    prep: Annotated[
        bool, typer.Option("--prep", help="Also time psannlm prep on the whole corpus, beside the raw libraries.")
    ] = False,
    engine: EngineOption = "local",
    per_line: PerLineOption = False,
    text_key: TextKeyOption = "text",
    out: Annotated[
        Path | None, typer.Option("--out", help="Output folder; default: reports/tokenizers/<time>.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare tokenizer backends: training time and memory, speed, bytes per token on held-out text, losslessness."""
    from psannlm.benchmarks.tokenization.bench import bench_tokenizers as measure
    from psannlm.benchmarks.tokenization.report import draw_tokenizers
    from psannlm.config.data import BuiltinSource, PathSource
    from psannlm.io.run_metadata import require_folder
    from psannlm.tokenizers.sample import SAMPLE_CHARS

    def source(path: str) -> PathSource:
        return PathSource(path=path, per_line=per_line, text_key=text_key)

    if engine != "local" and not prep:
        raise typer.BadParameter("it chooses what prep is timed with; add --prep", param_hint="--engine")
    require_existing("--model", *(model or []), what="tokenizer")
    require_folder("tokenizers", out)
    with live_line(stderr_console()) as line:
        report = measure(
            [source(path) for path in corpus] if corpus else [BuiltinSource(builtin="python-reference")],
            held_out=[] if held_out is None else [source(held_out)],
            models=model or [],
            vocab_size=vocab_size,
            corpus_repeat=corpus_repeat,
            repeats=repeats,
            seed=seed,
            sample_chars=SAMPLE_CHARS if sample_chars is None else sample_chars,
            with_prep=prep,
            engine=engine,
            on_progress=line.show,
        )
    tables = [_table(report), *([_prep_table(report)] if report.prep else [])]

    def draw(folder: Path) -> None:
        title = f"Tokenizers with a vocabulary of at most {vocab_size:,}"
        draw_tokenizers(folder / "tokenizers.png", title, report.tokenizers)

    publish("tokenizers", out, report.as_dict(), tables, as_json, draw=draw)


def _table(report: TokenizerReport) -> Table:
    held_out = report.held_out
    repeated = f" (each passage {held_out.repeat:,} times)" if held_out.repeat > 1 else ""
    table = _columns_table(
        f"tokenizers on {held_out.bytes:,} held-out bytes{repeated}, {held_out.overlap:.1%} of them verbatim in "
        f"the training text too; medians of {report.repeats}",
        "MB: a million bytes; of raw: our encoding throughput over the raw library's, with the lowest and "
        "highest run; peak: highest resident memory of a process of its own, Python, library and text included",
        [row.name for row in report.tokenizers],
    )
    rows: list[tuple[str, Callable[[TokenizerFigures], str]]] = [
        ("bytes per token", lambda row: f"{row.bytes_per_token:.3f}"),
        ("tokens per char", lambda row: f"{row.tokens_per_char:.3f}"),
        ("vocabulary", lambda row: f"{row.vocab_size:,}"),
        ("lossless", lambda row: "yes" if row.lost is None else f"no: {row.lost}"),
        ("model size, KB", lambda row: f"{row.model_bytes / 1e3:,.1f}"),
        ("fit, s", lambda row: "-" if row.fit_s is None else f"{row.fit_s.median:,.2f}"),
        ("fit peak, MB", lambda row: "-" if row.fit_peak_bytes is None else f"{row.fit_peak_bytes / 1e6:,.0f}"),
    ]
    for heading, figure in rows:
        table.add_row(heading, *(Text(figure(row)) for row in report.tokenizers))
    for words, speed_of in (("one thread", _one_thread), ("all threads", _all_threads)):
        table.add_section()
        table.add_row(Text(words, style="bold"))
        for heading, read in _speed_rows(report):
            table.add_row(f" {heading}", *(Text(read(row, speed_of(row))) for row in report.tokenizers))
    return table


def _prep_table(report: TokenizerReport) -> Table:
    """Return the table of the tokenizers that have a library underneath."""
    first = report.prep[0]
    table = _columns_table(
        f"psannlm prep on all {first.n_bytes / 1e6:,.1f} MB of text, {first.workers} processes, beside the raw "
        f"libraries with as many threads; medians of {report.repeats}",
        "prep: the whole command, which writes shards; the libraries read and write no files; peak: memory of "
        "all processes of prep together",
        [row.name for row in report.prep],
    )
    rows: list[tuple[str, Callable[[PrepFigures], str]]] = [
        ("prep, MB/s", lambda row: f"{row.mb_per_s(row.prep_s):,.2f}"),
        ("library, MB/s", lambda row: f"{row.mb_per_s(row.raw_s):,.2f}"),
        ("prep / library", lambda row: _ratio(row.ratio_to_raw, True)),
        (
            "into arrays, MB/s",
            lambda row: "-" if row.raw_arrays_s is None else f"{row.mb_per_s(row.raw_arrays_s):,.2f}",
        ),
        ("prep / library", lambda row: _ratio(row.ratio_to_raw_arrays, True)),
        ("prep, CPU s", lambda row: f"{row.prep_cpu_s.median:,.1f}"),
        ("library, CPU s", lambda row: f"{row.raw_cpu_s.median:,.1f}"),
        ("peak, MB", lambda row: "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}"),
        ("tokens", lambda row: f"{row.n_tokens:,}"),
        ("extra tokens", lambda row: f"{row.extra_tokens:,}"),
    ]
    if any(row.ray is not None for row in report.prep):
        rows += _RAY_ROWS
    for heading, figure in rows:
        table.add_row(heading, *(Text(figure(row)) for row in report.prep))
    return table


_RAY_ROWS: list[tuple[str, Callable[[PrepFigures], str]]] = [
    ("with Ray, MB/s", lambda row: "-" if row.ray is None else f"{row.mb_per_s(row.ray.prep_s):,.2f}"),
    ("Ray / local", lambda row: "-" if row.ray is None else _ratio(row.ray.ratio_to_local, True)),
    ("Ray's start, s", lambda row: "-" if row.ray is None else f"{row.ray.start_s.median:,.1f}"),
    (
        "Ray, CPU s",
        lambda row: "-" if row.ray is None or row.ray.prep_cpu_s is None else f"{row.ray.prep_cpu_s.median:,.1f}",
    ),
    (
        "Ray, peak, MB",
        lambda row: "-" if row.ray is None or row.ray.peak_bytes is None else f"{row.ray.peak_bytes / 1e6:,.0f}",
    ),
]


def _columns_table(title: str, caption: str, names: list[str]) -> Table:
    """Return an empty table with a column for each tokenizer: there are few of them, and many figures."""
    table = Table(title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    table.caption, table.caption_justify = caption, "left"
    table.add_column(style="cyan", no_wrap=True)
    for name in names:
        # Broken between its words, so that four columns fit into 80 characters.
        heading = Text(name.replace("sentencepiece ", "sentence-\npiece\n"))
        table.add_column(heading, justify="right", overflow="fold")
    return table


def _one_thread(row: TokenizerFigures) -> Speed:
    return row.one_thread


def _all_threads(row: TokenizerFigures) -> Speed:
    return row.all_threads


def _speed_rows(report: TokenizerReport) -> list[tuple[str, Callable[[TokenizerFigures, Speed], str]]]:
    return [
        ("encode, s", lambda row, speed: f"{speed.encode_s.median:,.3g}"),
        ("encode, MB/s", lambda row, speed: f"{row.mb_per_s(speed.encode_s):,.2f}"),
        ("encode, tokens/s", lambda row, speed: f"{row.tokens_per_s(speed.encode_s):,.0f}"),
        ("of raw", lambda row, speed: _ratio(speed.ratio_to_raw, row.same_ids_as_raw)),
        ("decode, MB/s", lambda row, speed: f"{row.mb_per_s(speed.decode_s):,.2f}"),
        ("decode, tokens/s", lambda row, speed: f"{row.tokens_per_s(speed.decode_s):,.0f}"),
        ("peak, MB", lambda row, speed: f"{speed.peak_bytes / 1e6:,.0f}"),
    ]


def _ratio(ratio: Spread | None, has_same_ids: bool | None) -> str:
    if ratio is None:
        return "-"
    note = "" if has_same_ids else "\n(other ids)"
    return f"{ratio.median:.2f}\n{ratio.lowest:.2f}–{ratio.highest:.2f}{note}"

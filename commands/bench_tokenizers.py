"""psannlm bench-tokenizers: a corpus to a table of how tokenizer backends do on text they have not seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from psannlm.commands.options import JsonOption, live_line, print_json, progress, results, table_text

if TYPE_CHECKING:
    from psannlm.benchmarks.timing import Spread
    from psannlm.benchmarks.tokenizers import TokenizerFigures, TokenizerReport


def bench_tokenizers(
    corpus: Annotated[
        list[str] | None,
        typer.Option("--corpus", help="File, folder or glob; may be repeated. Default: Python's own reference manual."),
    ] = None,
    held_out: Annotated[
        str | None, typer.Option("--held-out", help="Text to measure on. Default: a tenth of the corpus's documents.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Entries at most of what is fitted.")] = 4096,
    repeat: Annotated[int, typer.Option(min=1, help="Counted runs of each; the median is shown.")] = 3,
    model: Annotated[
        list[Path] | None, typer.Option("--model", help="A tokenizer file to measure beside them; may be repeated.")
    ] = None,
    per_line: Annotated[bool, typer.Option("--per-line", help="A document per line of a .txt file.")] = False,
    text_key: Annotated[str, typer.Option(help="Key of the text in .jsonl and .parquet files.")] = "text",
    out: Annotated[Path | None, typer.Option("--out", help="Folder for what is written.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare tokenizer backends: time to fit, speed, bytes per token on held-out text, losses."""
    from psannlm.benchmarks.tokenizers import bench_tokenizers as measure
    from psannlm.config.data import BuiltinSource, PathSource
    from psannlm.reports.store import new_folder, system_info, write_json
    from psannlm.storage import write_text

    def source(path: str) -> PathSource:
        return PathSource(path=path, per_line=per_line, text_key=text_key)

    with live_line(progress()) as line:
        report = measure(
            [source(path) for path in corpus] if corpus else [BuiltinSource(builtin="python-reference")],
            held_out=[] if held_out is None else [source(held_out)],
            models=model or [],
            vocab_size=vocab_size,
            repeats=repeat,
            notice=line.keep,
            on_standing=lambda standing: line.show(str(standing)),
        )
    table = _table(report)
    folder = new_folder("tokenizers", out)
    metrics = {"corpus": corpus or ["python-reference"], **report.as_dict()}
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "system.json", system_info())
    write_text(folder / "table.txt", table_text(table))
    if as_json:
        print_json({**metrics, "folder": str(folder)})
    else:
        results().print(table)
        results().print(f"written to {folder}", highlight=False, markup=False)


def _table(report: TokenizerReport) -> Table:
    """Return a column for each tokenizer: there are few of them, and many figures."""
    held_out = report.held_out
    documents = f"{held_out.documents:,} document{'' if held_out.documents == 1 else 's'}"
    table = Table(
        title=f"tokenizers on {held_out.bytes:,} held-out bytes in {documents}, {held_out.overlap:.1%} of it word for "
        f"word in the fitting text too; medians of {report.repeats}",
        title_justify="left",
        title_style="bold",
        caption="MB: a million bytes of text; beside the median, the lowest and highest",
        caption_justify="left",
    )
    table.add_column(style="cyan")
    for row in report.tokenizers:
        table.add_column(Text(row.name), justify="right", overflow="fold")
    rows: list[tuple[str, Callable[[TokenizerFigures], str]]] = [
        ("bytes per token", lambda row: f"{row.bytes_per_token:.3f}"),
        ("vocabulary", lambda row: f"{row.vocab_size:,}"),
        ("lossless", lambda row: "yes" if row.lost is None else f"no: {row.lost}"),
        ("file, bytes", lambda row: f"{row.model_bytes:,}"),
        ("fit, s", lambda row: "-" if row.fit_s is None else f"{row.fit_s.median:,.2f}"),
        ("encode, MB/s", lambda row: f"{row.mb_per_s(row.encode_s):,.2f}"),
        ("encode, tokens/s", lambda row: f"{row.tokens_per_s(row.encode_s):,.0f}"),
        ("encode, of the raw library's rate", lambda row: _ratio(row.ratio_to_raw, row.same_ids_as_raw)),
        ("decode, MB/s", lambda row: f"{row.mb_per_s(row.decode_s):,.2f}"),
        ("decode, tokens/s", lambda row: f"{row.tokens_per_s(row.decode_s):,.0f}"),
    ]
    for heading, figure in rows:
        table.add_row(heading, *(Text(figure(row)) for row in report.tokenizers))
    return table


def _ratio(ratio: Spread | None, has_same_ids: bool | None) -> str:
    if ratio is None:
        return "-"
    note = "" if has_same_ids else " (other ids)"
    return f"{ratio.median:.2f} ({ratio.lowest:.2f}–{ratio.highest:.2f}){note}"

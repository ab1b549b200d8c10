"""Tables, plot and headlines of a serving benchmark (``reports/serving/<ts>/metrics.json``)."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from psannlm.reports.page_model import Headline, Picture, Table, format_float, format_value
from psannlm.reports.plots import Curve, draw_curves
from psannlm.reports.schemas.serving import Percentiles, ServingMetrics, ServingRow
from psannlm.reports.tables.generic import tables_of

PLOT_FILE = "serving.png"
_OURS = "psannlm"
_HEADINGS = (
    "server and load",
    "requests",
    "failed",
    "tokens/s",
    "ours over it, tokens/s",
    "first token, ms: p50, p95, p99",
    "between parts of a text, ms: p50, p95, p99",
    "memory, MB",
)


def serving_tables(metrics: ServingMetrics, figures: dict[str, Any]) -> list[Table]:
    """Return a table of servers and loads, and every other of the artifact's ``figures`` in folded tables."""
    note = (
        f"Prompts of {metrics.prompt_tokens:,} tokens, {metrics.new_tokens:,} new; weights in {metrics.dtype}; "
        f"{metrics.device}, {_count(metrics.threads, 'thread')}. Medians of "
        f"{_count(metrics.repeats, 'interleaved run')}."
    )
    if metrics.engine_batch is not None:
        batch = metrics.engine_batch
        note += f" The engine alone decodes batches of {batch.batch_size} at {_spread(batch.tokens_per_s)} tokens/s"
        served = batch.served_over_it
        note += "." if served is None else f"; served, {_spread(served)} of that."
    if metrics.check is not None:
        note += f" {metrics.check.compared:,} answers compared with the engine's own, {metrics.check.wrong:,} wrong."
    if not metrics.is_complete:
        note += " Interrupted: figures so far."
    if metrics.problems:
        note += f" Problems: {'; '.join(metrics.problems)}."
    if metrics.soak is not None:
        soak = metrics.soak
        note += f" Soak of {soak.requests:,} requests at concurrency {soak.concurrency}: {soak.lost:,} lost."
    if not metrics.rows:
        return [Table("", ("soak",), [[note]]), *tables_of(figures)]
    return [
        Table("", _HEADINGS, [_row(row) for row in metrics.rows], frozenset(range(1, len(_HEADINGS))), note),
        *(replace(table, is_folded=True) for table in tables_of(figures)),
    ]


def serving_pictures(metrics: ServingMetrics, prefix: str = "") -> list[Picture]:
    """Return a plot of the throughput of each server against the number of clients; none with a single number."""
    rows = [row for row in metrics.rows if row.concurrency is not None and row.tokens_per_s is not None]
    if len({row.concurrency for row in rows}) < 2:
        return []
    curves = []
    for server in dict.fromkeys(row.server for row in rows):
        points = [
            (float(row.concurrency), row.tokens_per_s.median)
            for row in rows
            if row.server == server and row.concurrency is not None and row.tokens_per_s is not None
        ]
        curves.append(Curve(server, [x for x, _ in points], [y for _, y in points]))
    caption = (
        f"New tokens per second of all clients together; {metrics.parameters / 1e6:,.1f}M parameters, {metrics.dtype}."
    )
    label = "clients, each with one request at a time"
    return [draw_curves(f"{prefix}{PLOT_FILE}", curves, label, "tokens per second", caption, is_log_x=True)]


def serving_headlines(metrics: ServingMetrics) -> list[Headline]:
    """Return our server's highest throughput."""
    rows = [row for row in metrics.rows if row.server == _OURS and row.tokens_per_s is not None]
    if not rows:
        return []
    best = max(rows, key=lambda row: row.tokens_per_s.median if row.tokens_per_s is not None else 0.0)
    assert best.tokens_per_s is not None
    of = f"{best.level}; {metrics.parameters / 1e6:,.1f}M parameters, {metrics.dtype}"
    return [Headline(format_float(best.tokens_per_s.median, 3), "tokens/s", "Highest throughput served", of)]


def _row(row: ServingRow) -> list[str]:
    ratio = row.our_tokens_per_s_over_its
    return [
        f"{row.server}, {row.level}",
        format_value(row.requests),
        format_value(row.failed),
        "–" if row.tokens_per_s is None else _spread(row.tokens_per_s),
        "–" if ratio is None else _spread(ratio),
        _milliseconds(row.first_token_s),
        _milliseconds(row.between_tokens_s),
        "–" if row.resident_bytes is None else f"{row.resident_bytes / 1e6:,.0f}",
    ]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _spread(spread: Any) -> str:
    return format_value(asdict(spread), 3)


def _milliseconds(found: Percentiles | None) -> str:
    if found is None:
        return "–"
    return ", ".join(format_float(1e3 * spread.median, 3) for spread in (found.p50, found.p95, found.p99))

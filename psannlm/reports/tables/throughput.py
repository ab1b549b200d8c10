"""Table of a training benchmark (``reports/throughput/<ts>/metrics.json``)."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from psannlm.reports.page_model import Table, format_value
from psannlm.reports.schemas.throughput import ThroughputMetrics, ThroughputRow
from psannlm.reports.tables.generic import tables_of

_HEADINGS = (
    "model",
    "tokens/s",
    "ours over it, tokens/s",
    "fraction of the matrix peak",
    "step, ms",
    "first step, s",
    "peak memory, MB",
    "parameters",
    "loss, first step and last, nats per token",
)


def throughput_tables(metrics: ThroughputMetrics, figures: dict[str, Any]) -> list[Table]:
    """Return a table of the candidates, and every other of the artifact's ``figures`` in folded tables."""
    rows = [_row(row) for row in metrics.rows]
    batch_tokens, seq_len = format_value(metrics.batch_tokens), format_value(metrics.seq_len)
    note = f"{batch_tokens} tokens per step, windows of {seq_len}; {metrics.precision}"
    if metrics.problems:
        note += f". Problems: {'; '.join(metrics.problems)}"
    return [
        Table("", _HEADINGS, rows, frozenset(range(1, len(_HEADINGS))), note + "."),
        *(replace(table, is_folded=True) for table in tables_of(figures)),
    ]


def _row(row: ThroughputRow) -> list[str]:
    rate = {"median": row.tokens_per_s, "lowest": row.tokens_per_s_lowest, "highest": row.tokens_per_s_highest}
    return [
        row.name,
        format_value(rate, 3),
        format_value(asdict(row.ours_over_it), 3),
        "–" if row.utilisation is None else f"{100 * row.utilisation:.1f} %",
        format_value(None if row.step_s is None else 1e3 * row.step_s, 3),
        format_value(row.first_step_s, 3),
        "–" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}",
        format_value(row.parameters),
        f"{format_value(row.first_loss)}, {format_value(row.last_loss)}",
    ]

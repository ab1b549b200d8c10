"""Tables of a training benchmark: one that fits a page, and every figure in folded ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from psannlm.io.artifact_schema import read_figures
from psannlm.reports.schemas.throughput import ThroughputMetrics
from psannlm.reports.tables.throughput import throughput_tables

KEPT = sorted((Path(__file__).resolve().parents[3] / "reports" / "published" / "throughput").glob("*/metrics.json"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.parent.name)
def test_throughput_tables_of_published_runs_fit_a_page(path: Path) -> None:
    figures = json.loads(path.read_text(encoding="utf-8"))
    first, *others = throughput_tables(read_figures(ThroughputMetrics, figures), figures)
    assert [row[0] for row in first.rows] == [row["name"] for row in figures["rows"]]
    assert len(first.headings) <= 9
    assert all(len(row) == len(first.headings) for row in first.rows)
    ours = figures["rows"][0]
    assert first.rows[0][3] == f"{100 * ours['utilisation']:.1f} %"
    assert first.rows[0][6] == ("–" if ours["peak_bytes"] is None else f"{ours['peak_bytes'] / 1e6:,.0f}")
    assert others
    assert all(table.is_folded for table in others)


def test_throughput_tables_note_lists_problems() -> None:
    figures = json.loads(KEPT[0].read_text(encoding="utf-8"))
    figures["problems"] = ["a loss is not finite"]
    figures["rows"][0]["peak_bytes"] = None
    table = throughput_tables(read_figures(ThroughputMetrics, figures), figures)[0]
    assert "Problems: a loss is not finite" in table.note
    assert table.rows[0][6] == "–"

"""Tables of a GPU validation: failed checks are open, those within their limits are folded."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from psannlm.gpu_suite.measures import at_least, at_most
from psannlm.io.artifact_schema import read_figures
from psannlm.reports.build import write_report
from psannlm.reports.gather import gather
from psannlm.reports.page_model import Origin, Table
from psannlm.reports.pages import build_document
from psannlm.reports.schemas.gpu import CheckResult, GpuMachine, SuiteReport
from psannlm.reports.tables.gpu import suite_headlines, suite_memory, suite_rates, suite_tables

FORWARD = "respsann, 131,072 tokens: forward"
MACHINE: GpuMachine = {"device": "cuda", "name": "NVIDIA H200", "n_devices": 1, "threads": None, "torch": "2.11.0"}


def report(**changes: Any) -> SuiteReport:
    """The report as it comes back from its file."""
    results = (
        CheckResult("GPU-01", "gradients", (at_most("error", 2e-6, 1e-4, "of its length", "sums"),), notes=("a note",)),
        CheckResult(
            "GPU-03", "throughput", (at_least(FORWARD, 7e6, 6.1e6, "tokens/s", "ten times", spread=(6e6, 8e6)),)
        ),
        CheckResult("GPU-04", "memory", (at_most("peak", 5000.0, 4000.0, "MB", "foretold"),)),
        CheckResult("GPU-05", "data parallel", skipped="there is one GPU"),
        CheckResult("GPU-08", "checkpoints", error="RuntimeError: out of luck"),
    )
    plain = SuiteReport(MACHINE, False, results, "earlier", ("GPU-03: rate: 1 now, 2 in the baseline",)).as_dict()
    return read_figures(SuiteReport, {**json.loads(json.dumps(plain)), **changes})


def test_suite_tables_show_verdict_and_result_per_check() -> None:
    overview, worse, *values = suite_tables(report())
    assert overview.title == "1 × NVIDIA H200, torch 2.11.0: failed"
    assert [(row[0], row[2], row[4]) for row in overview.rows] == [
        ("GPU-01", "ok", "1 limits met"),
        ("GPU-03", "ok", "1 limits met"),
        ("GPU-04", "failed", "peak: 5,000 MB (≤ 4,000)"),
        ("GPU-05", "skipped", "there is one GPU"),
        ("GPU-08", "error", "RuntimeError: out of luck"),
    ]
    assert worse.rows == [["GPU-03: rate: 1 now, 2 in the baseline"]]
    assert [(table.title.split(",")[0], table.is_folded) for table in values] == [
        ("GPU-01", True),
        ("GPU-03", True),
        ("GPU-04", False),
    ]
    assert values[1].rows[0][:5] == [FORWARD, "7,000,000 (6,000,000 to 8,000,000)", "≥ 6,100,000", "tokens/s", "ok"]
    assert values[0].note == "a note"


def test_suite_headlines_count_passed_checks_and_show_published_throughput() -> None:
    checks, forward = suite_headlines(report())
    assert (checks.value, checks.of) == ("2 of 4", "1 × NVIDIA H200: failed; 1 skipped")
    assert (forward.value, forward.label, forward.of) == ("7,000,000", FORWARD, "at least 6,100,000: ten times")


def test_suite_rates_and_memory_known_values() -> None:
    machine = {**MACHINE, "memory_bytes": 150_000_000_000}
    (rate,) = suite_rates(report(machine=machine))
    assert rate == {
        "name": f"GPU-03 / {FORWARD}",
        "base": "respsann",
        "batch_tokens": 131_072,
        "figure": "forward_tokens_per_s",
        "tokens_per_s": 7e6,
        "tokens_per_s_lowest": 6e6,
        "tokens_per_s_highest": 8e6,
    }
    # The memory that the card has is none that was used.
    [peak] = suite_memory(report(machine=machine))
    assert (peak["name"], peak["figure"], peak["bytes"]) == ("GPU-04 / peak", "peak_bytes", 5_000_000_000)
    assert [*suite_rates(report(checks=[])), *suite_memory(report(checks=[]))] == []


def test_report_csv_and_memory_include_gpu_suite(tmp_path: Path) -> None:
    folder = tmp_path / "reports" / "gpu" / "20261124_000000"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(report().as_dict()), encoding="utf-8")
    written = write_report(tmp_path / "reports", [], {}, out=tmp_path / "out")
    with (written.page.parent / "throughput.csv").open(encoding="utf-8") as lines:
        assert [row["tokens_per_s"] for row in csv.DictReader(lines)] == ["7000000.0"]
    memory = json.loads((written.page.parent / "memory.json").read_text(encoding="utf-8"))
    assert [row["bytes"] for row in memory] == [5_000_000_000]


def test_suite_tables_show_detail_where_the_summary_has_it() -> None:
    broken = CheckResult("GPU-08", "t", (at_most("others", 1.0, 0.0, "tensors", "", detail="embedding.weight"),))
    plain = SuiteReport(MACHINE, True, (broken,)).as_dict()
    assert suite_tables(read_figures(SuiteReport, plain))[1].rows[0][0] == "others (embedding.weight)"
    del plain["checks"][0]["measures"][0]["detail"]
    assert suite_tables(read_figures(SuiteReport, plain))[1].rows[0][0] == "others"


def test_suite_tables_show_nan_values() -> None:
    broken = CheckResult("GPU-01", "t", (at_most("error", float("nan"), 1.0, "x", ""),))
    plain = json.loads(json.dumps(SuiteReport(MACHINE, True, (broken,)).as_dict()))
    overview, values = suite_tables(read_figures(SuiteReport, plain))
    assert overview.rows[0][4] == "error: nan x (≤ 1.000)"
    assert values.rows[0][1] == "nan"


def test_report_shows_other_figures_as_generic_tables(tmp_path: Path) -> None:
    folder = tmp_path / "gpu" / "20261124_000000_try"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text('{"checks": [{"a": 1}, {"a": 2}]}', encoding="utf-8")
    found = gather(tmp_path, [])
    document = build_document(found, Origin(), [])
    assert document.sections[0].title == "GPU validation, 2026-11-24 00:00 UTC, try"
    assert any(isinstance(block, Table) and block.title == "Checks" for block in document.sections[0].blocks)
    assert "not the figures of a GPU validation" in found.unread[0].reason

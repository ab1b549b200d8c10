"""``psannlm gpu-validate``: what it writes, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.errors import Interrupted
from psannlm.gpu_suite import suite
from psannlm.gpu_suite.measures import at_least, at_most
from psannlm.io.artifact_schema import read_figures
from psannlm.reports.schemas.gpu import CheckResult, SuiteReport
from psannlm.reports.tables.gpu import suite_headlines, suite_tables

Run = Callable[..., Any]


@pytest.fixture
def rate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[float], None]:
    """Replace the suite by one check of a throughput of at least 50, and return a setter of the measured value."""
    monkeypatch.chdir(tmp_path)
    now = [100.0]

    def check(context: Any) -> CheckResult:
        context.say("GPU-03: measuring")
        measures = (
            at_least("rate", now[0], 50.0, "tokens/s", "because", regression=0.1),
            at_most("error", 0.0, 1.0, "x", "because"),
        )
        series = {"batch tokens": [512.0, 1024.0], "respsann: training": [1e5, 2e5]}
        return CheckResult("GPU-03", "throughput", measures, series=series)

    monkeypatch.setattr(suite, "CHECKS", {"GPU-03": check})
    return lambda value: now.__setitem__(0, value)


def test_gpu_validate_writes_all_files(psannlm: Run, rate: Callable[[float], None], tmp_path: Path) -> None:
    ended = psannlm("gpu-validate", "--device", "cpu", "--only", "GPU-03", "--json")
    assert ended.code == 0
    told = json.loads(ended.out)
    folder = Path(told.pop("folder"))
    assert folder.parent == Path("reports/gpu")
    names = {path.name for path in folder.iterdir()}
    assert names == {"summary.json", "system.json", "stdout.log", "table.txt", "throughput.png"}
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8")) == told
    assert told["verdict"] == "ok"
    assert "GPU-03: measuring" in (folder / "stdout.log").read_text(encoding="utf-8")
    assert "because" in (folder / "table.txt").read_text(encoding="utf-8")


def test_gpu_validate_missed_limit_exits_3(psannlm: Run, rate: Callable[[float], None]) -> None:
    rate(40.0)
    ended = psannlm("gpu-validate", "--device", "cpu", "--out", "here")
    assert ended.code == 3
    assert "error: GPU-03: rate: 40 tokens/s (at least 50)" in ended.err
    assert json.loads(Path("here/summary.json").read_text(encoding="utf-8"))["verdict"] == "failed"
    assert "MISSED" in Path("here/table.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_gpu_validate_regression_exits_3(psannlm: Run, rate: Callable[[float], None]) -> None:
    assert psannlm("gpu-validate", "--device", "cpu", "--out", "before").code == 0
    rate(95.0)
    assert psannlm("gpu-validate", "--device", "cpu", "--out", "now", "--baseline", "before").code == 0
    rate(80.0)
    ended = psannlm("gpu-validate", "--device", "cpu", "--out", "now", "--baseline", "before/summary.json")
    assert ended.code == 3
    assert "80 tokens/s now, 100 in the baseline (-20.0%); 10% worse is allowed" in ended.err


def test_gpu_validate_without_gpu_exits_1(
    psannlm: Run, rate: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ended = psannlm("gpu-validate")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("error: torch ")
    assert ended.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_gpu_validate_wrong_usage_exits_2(psannlm: Run, rate: Callable[[float], None], tmp_path: Path) -> None:
    assert psannlm("gpu-validate", "--device", "cpu", "--only", "GPU-99").code == 2
    assert psannlm("gpu-validate", "--device", "tpu").code == 2
    assert psannlm("gpu-validate", "--device", "cpu", "--baseline", "absent.json").code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", [KeyboardInterrupt(), Interrupted("stopped")], ids=["ctrl-c", "in a training run"])
def test_gpu_validate_interrupted_keeps_finished_checks(
    psannlm: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: BaseException
) -> None:
    monkeypatch.chdir(tmp_path)

    def good(name: str) -> Callable[[Any], CheckResult]:
        return lambda context: CheckResult(name, "a check", (at_most("error", 0.0, 1.0, "x", "because"),))

    def stopped(context: Any) -> CheckResult:
        raise how

    checks = {"GPU-01": good("GPU-01"), "GPU-02": good("GPU-02"), "GPU-03": stopped, "GPU-04": good("GPU-04")}
    monkeypatch.setattr(suite, "CHECKS", checks)
    assert psannlm("gpu-validate", "--device", "cpu", "--out", "here").code == 130
    summary = json.loads(Path("here/summary.json").read_text(encoding="utf-8"))
    assert summary["verdict"] == "unfinished"
    assert [check["check"] for check in summary["checks"]] == ["GPU-01", "GPU-02"]
    assert summary["to_come"] == ["GPU-03", "GPU-04"]
    table = Path("here/table.txt").read_text(encoding="utf-8")
    assert "unfinished" in table
    assert "not run yet: GPU-03, GPU-04" in table
    report = read_figures(SuiteReport, summary)
    suite_tables(report)
    suite_headlines(report)

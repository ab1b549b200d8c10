"""Plots of the GPU validation suite, with missing curves too."""

from __future__ import annotations

from pathlib import Path

import pytest

from psannlm.gpu_suite.plots import draw_suite
from psannlm.reports.schemas.gpu import CheckResult, GpuMachine, SuiteReport

MACHINE: GpuMachine = {"device": "cuda", "name": "H200", "n_devices": 1, "torch": "2.13.0"}
LOSSES = {"respsann, float32": [3.0, 2.0, 1.0], "respsann, bfloat16": [3.0, 2.1, 1.1], "respsann, float16": [3.0]}
RATES = {"batch tokens": [512.0, 1024.0], "respsann: training": [1e5, 2e5], "respsann: forward": [1e6]}


@pytest.mark.parametrize(
    ("check", "series", "file"),
    [
        ("GPU-02", LOSSES, "precision.png"),
        ("GPU-02", {"respsann, float32": [3.0], "respsann, bfloat16": [float("nan")]}, "precision.png"),
        ("GPU-03", RATES, "throughput.png"),
    ],
    ids=["precisions", "one step, no number", "rates"],
)
def test_draw_suite_writes_plots_of_curves(
    tmp_path: Path, check: str, series: dict[str, list[float]], file: str
) -> None:
    report = SuiteReport(MACHINE, False, (CheckResult(check, "t", series=series),))
    [path] = draw_suite(tmp_path, report)
    assert path == tmp_path / file
    assert path.read_bytes().startswith(b"\x89PNG")


def test_draw_suite_skips_checks_without_curves(tmp_path: Path) -> None:
    results = (CheckResult("GPU-02", "t", error="it broke"), CheckResult("GPU-03", "t", series={"batch tokens": []}))
    assert draw_suite(tmp_path, SuiteReport(MACHINE, False, results)) == []
    assert list(tmp_path.iterdir()) == []

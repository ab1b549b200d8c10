"""Baselines: comparable ones only, and one line for each value that became worse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from psannlm.errors import ArtifactError, ConfigError
from psannlm.gpu_suite.baseline import read_baseline, regressions
from psannlm.gpu_suite.measures import at_least, at_most
from psannlm.io.artifact_schema import read_figures
from psannlm.reports.schemas.gpu import CheckResult, SuiteReport

MACHINE = {"device": "cuda", "name": "H200", "n_devices": 1, "threads": None, "torch": "2.13.0"}


def result(rate: float = 100.0, peak: float = 50.0, error: float = 1e-6) -> CheckResult:
    return CheckResult(
        "GPU-03",
        "throughput",
        (
            at_least("rate", rate, 0.0, "tokens/s", "", regression=0.1),
            at_most("peak", peak, 1e9, "MB", "", regression=0.05),
            at_most("error", error, 1.0, "x", ""),
        ),
    )


def written(folder: Path, **changes: Any) -> Path:
    summary = {**SuiteReport(MACHINE, False, (result(),)).as_dict(), **changes}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("now", "lines"),
    [
        (result(), []),
        (result(rate=91.0, peak=52.0), []),
        (result(rate=200.0, peak=1.0), []),
        (result(rate=89.0), ["rate: 89 tokens/s now, 100 in the baseline (-11.0%); 10% worse is allowed"]),
        (result(peak=53.0), ["peak: 53 MB now, 50 in the baseline (+6.0%); 5% worse is allowed"]),
        (result(rate=float("nan")), ["rate: nan tokens/s now, 100 in the baseline (+nan%); 10% worse is allowed"]),
        (result(error=0.5), []),  # its limit alone counts
    ],
    ids=["same", "within", "better", "slower", "larger", "no number", "no tolerance"],
)
def test_regressions_name_each_worse_value(tmp_path: Path, now: CheckResult, lines: list[str]) -> None:
    former = read_baseline(written(tmp_path), MACHINE, is_dry_run=False, any_machine=False)
    assert regressions([now], former) == [f"GPU-03: {line}" for line in lines]


def test_regressions_name_missing_values_and_skipped_checks(tmp_path: Path) -> None:
    former = read_baseline(written(tmp_path), MACHINE, is_dry_run=False, any_machine=False)
    less = CheckResult("GPU-03", "t", result().measures[1:])
    assert regressions([less], former) == ["GPU-03: rate: measured in the baseline, and not now"]
    skipped = CheckResult("GPU-03", "t", skipped="no time")
    assert regressions([skipped], former) == ["GPU-03: ran in the baseline, and is skipped now: no time"]
    assert regressions([CheckResult("GPU-04", "t", skipped="new")], former) == []


@pytest.mark.parametrize("change", [{"name": "H100"}, {"n_devices": 2}, {"device": "cpu"}], ids=str)
def test_baseline_of_another_machine_needs_option(tmp_path: Path, change: dict[str, Any]) -> None:
    path = written(tmp_path)
    with pytest.raises(ConfigError, match="another machine"):
        read_baseline(path, {**MACHINE, **change}, is_dry_run=False, any_machine=False)
    assert read_baseline(path, {**MACHINE, **change}, is_dry_run=False, any_machine=True).verdict == "ok"


def test_baseline_reads_former_key_is_rehearsal(tmp_path: Path) -> None:
    summary = json.loads((written(tmp_path) / "summary.json").read_text(encoding="utf-8"))
    summary["is_rehearsal"] = summary.pop("is_dry_run")
    (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    assert read_baseline(tmp_path, MACHINE, is_dry_run=False, any_machine=False).verdict == "ok"
    with pytest.raises(ConfigError, match="a run at full size and this is a dry run"):
        read_baseline(tmp_path, MACHINE, is_dry_run=True, any_machine=False)


def test_regressions_know_former_names_of_measures(tmp_path: Path) -> None:
    summary = json.loads((written(tmp_path) / "summary.json").read_text(encoding="utf-8"))
    summary["checks"][0]["measures"][0]["name"] = "respsann: floor of memory / step, float32, plain"
    now = CheckResult(
        "GPU-03",
        "throughput",
        (at_least("respsann: roofline / step, float32, plain", 50.0, 0.0, "of the step", "", regression=0.1),),
    )
    lines = regressions([now], read_figures(SuiteReport, summary))
    assert lines[:2] == [f"GPU-03: {name}: measured in the baseline, and not now" for name in ("peak", "error")]
    assert "respsann: roofline / step, float32, plain: 50 of the step now, 100 in the baseline" in lines[2]


def test_baseline_of_a_dry_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a dry run and this is a run at full size"):
        read_baseline(written(tmp_path, is_dry_run=True), MACHINE, is_dry_run=False, any_machine=True)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"machine": {}, "is_dry_run": false, "checks": [1]}'])
def test_damaged_baseline_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "summary.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"not a summary\.json of psannlm gpu-validate"):
        read_baseline(path, MACHINE, is_dry_run=False, any_machine=False)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_baseline(tmp_path / "absent.json", MACHINE, is_dry_run=False, any_machine=False)

"""GPU validation suite: selection of checks, errors in checks, and interruption."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from psannlm.errors import ConfigError, Interrupted, PsannlmError
from psannlm.gpu_suite import suite
from psannlm.gpu_suite.context import CheckContext
from psannlm.gpu_suite.measures import at_most
from psannlm.gpu_suite.suite import CHECKS, require_device, run_check, validate
from psannlm.reports.schemas.gpu import CheckResult, SuiteReport

GOOD = (at_most("error", 0.0, 1.0, "x", ""),)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every check replaced by one that notes its name; GPU-04 breaks."""
    ran: list[str] = []

    def fake(name: str) -> Any:
        def check(context: CheckContext) -> CheckResult:
            ran.append(name)
            (context.folder / "left behind").write_text("x", encoding="utf-8")
            if name == "GPU-04":
                raise RuntimeError("CUDA error: an illegal memory access\n  was encountered")
            return CheckResult(name, name, GOOD)

        return check

    monkeypatch.setattr(suite, "CHECKS", {name: fake(name) for name in CHECKS})
    return ran


def test_suite_has_nine_checks() -> None:
    assert list(CHECKS) == [f"GPU-0{number}" for number in range(1, 10)]


def test_suite_continues_after_a_raising_check(checks: list[str]) -> None:
    said: list[str] = []
    report = validate("cpu", say=said.append)
    assert checks == list(CHECKS)
    assert report.verdict == "failed"
    assert report.problems == ["GPU-04: RuntimeError: CUDA error: an illegal memory access was encountered"]
    assert [r.status for r in report.checks].count("ok") == 8
    assert any("Traceback" in line for line in said), "the log says where"


def test_suite_only_runs_selected_checks_in_order(checks: list[str]) -> None:
    assert validate("cpu", only=("GPU-08", "GPU-01")).verdict == "ok"
    assert checks == ["GPU-01", "GPU-08"]


def test_suite_unknown_check_raises(checks: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"'gpu-1' is not a check \(did you mean 'GPU-01'\?\)"):
        validate("cpu", only=("gpu-1",))
    assert checks == []


def test_suite_without_gpu_raises_with_exit_code_1(checks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PsannlmError, match="sees no GPU") as refused:
        require_device("cuda")
    assert refused.value.exit_code == 1
    assert "\n" not in str(refused.value)


def test_suite_ends_on_interrupt(context: CheckContext) -> None:
    def interrupted(context: CheckContext) -> CheckResult:
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        run_check("GPU-08", interrupted, context)


def test_suite_reports_device_that_cannot_be_freed(checks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an illegal access: every call on the device fails from then on, freeing memory among them."""

    def release(context: CheckContext) -> None:
        if len(checks) >= 3:
            raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    monkeypatch.setattr(CheckContext, "release", release)
    report = validate("cpu", only=[f"GPU-0{number}" for number in range(1, 6)])
    assert checks == [f"GPU-0{number}" for number in range(1, 6)]
    assert [r.status for r in report.checks] == ["ok", "ok", "error", "error", "error"]
    told = "the device could not be freed after the check: RuntimeError: CUDA error: an illegal memory access was encou"
    third, fourth, _ = (str(r.error) for r in report.checks[2:])
    assert third.startswith(told)
    assert fourth.startswith("RuntimeError: CUDA error: an illegal memory access was encountered; " + told)
    assert report.checks[2].measures == GOOD, "what was measured is kept"


def test_suite_reports_after_each_check(checks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[SuiteReport] = []
    report = validate("cpu", only=("GPU-01", "GPU-02", "GPU-03"), on_report=kept.append)
    assert [len(r.checks) for r in kept] == [1, 2, 3]
    assert [r.verdict for r in kept] == ["unfinished", "unfinished", "ok"]
    assert [r.to_come for r in kept] == [("GPU-02", "GPU-03"), ("GPU-03",), ()]
    assert kept[-1] == report


def test_suite_restores_thread_count(checks: list[str]) -> None:
    before = torch.get_num_threads()
    validate("cpu", only=("GPU-01",))
    assert torch.get_num_threads() == before

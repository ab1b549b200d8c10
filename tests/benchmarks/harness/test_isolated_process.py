"""Isolated processes: results, errors, exit, and a peak memory of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from psannlm.benchmarks.harness.isolated_process import IsolatedProcess
from psannlm.errors import TokenizerError, WorkerError
from psannlm.runtime.resident_memory import peak_resident_bytes


@pytest.fixture(autouse=True)
def _tests_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process is not given the working folder, and the class that it makes is of this file."""
    root = str(Path(__file__).resolve().parents[3])
    monkeypatch.setenv("PYTHONPATH", root)
    monkeypatch.syspath_prepend(root)


class Target:
    """Does what a test asks for, in the other process."""

    def __init__(self, start: int) -> None:
        self.value = start

    def add(self, more: int) -> int:
        self.value += more
        return self.value

    def pid(self) -> int:
        return os.getpid()

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    def peak(self) -> int:
        return peak_resident_bytes()

    def refuse(self) -> None:
        raise TokenizerError("no such piece")

    def fail(self) -> None:
        raise ZeroDivisionError("unforeseen")

    def die(self) -> None:
        os._exit(7)


@pytest.mark.slow
def test_isolated_process_has_own_memory_and_environment() -> None:
    ballast = bytearray(os.urandom(1 << 20) * 300)
    with IsolatedProcess(Target, 1, environment={"PSANNLM_TEST": "yes"}) as process:
        assert [process.call("add", 2), process.call("add", 3)] == [3, 6]
        assert process.call("pid") != os.getpid()
        assert process.call("variable", "PSANNLM_TEST") == "yes"
        assert process.call("peak") < len(ballast) < peak_resident_bytes()
    assert "PSANNLM_TEST" not in os.environ


@pytest.mark.slow
def test_isolated_process_reraises_errors() -> None:
    with IsolatedProcess(Target, 1) as process, pytest.raises(TokenizerError, match="no such piece"):
        process.call("refuse")
    with IsolatedProcess(Target, 1) as process, pytest.raises(WorkerError, match="unforeseen"):
        process.call("fail")
    with IsolatedProcess(Target, 1) as process, pytest.raises(WorkerError, match=r"ended early \(exit code 7\)"):
        process.call("die")

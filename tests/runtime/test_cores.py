"""Threads and workers stay within the affinity mask and the CPU quota of a process."""

from __future__ import annotations

import os

import pytest

from psannlm.runtime import cores
from psannlm.runtime.cores import limit_threads, threads_for, usable_cores, usable_workers


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """16 cores, no quota, and no number of threads in the environment."""
    monkeypatch.setattr(cores, "_bound_cores", lambda: 16)
    monkeypatch.setattr(cores, "cpu_quota", lambda: None)
    for name in ("OMP_NUM_THREADS", "PSANNLM_THREADS_OF_QUOTA"):
        # Set first, so that what a test leaves is undone.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(("quota", "n_cores"), [(None, 16), (4.0, 4), (2.9, 2), (0.5, 1), (64.0, 16)])
def test_usable_cores_respect_cpu_quota(machine: pytest.MonkeyPatch, quota: float | None, n_cores: int) -> None:
    machine.setattr(cores, "cpu_quota", lambda: quota)
    assert usable_cores() == n_cores


@pytest.mark.parametrize(("memory", "n_workers"), [(None, 16), (64 << 30, 16), (2 << 30, 8), (1 << 20, 1)])
def test_workers_fit_into_memory(machine: pytest.MonkeyPatch, memory: int | None, n_workers: int) -> None:
    machine.setattr(cores, "machine_memory_bytes", lambda: memory)
    assert usable_workers(256 << 20) == n_workers


def test_processes_divide_usable_cores(machine: pytest.MonkeyPatch) -> None:
    assert [threads_for(n)["OMP_NUM_THREADS"] for n in (1, 3, 8, 40)] == ["16", "5", "2", "1"]
    machine.setattr(cores, "cpu_quota", lambda: 8.0)
    assert threads_for(4) == {"OMP_NUM_THREADS": "2"}
    machine.setenv("OMP_NUM_THREADS", "3")
    assert threads_for(4) == {}, "the user's number holds for every process"


def test_quota_sets_threads_before_torch(machine: pytest.MonkeyPatch) -> None:
    limit_threads()
    assert "OMP_NUM_THREADS" not in os.environ, "without a quota, torch decides"
    machine.setattr(cores, "cpu_quota", lambda: 4.0)
    machine.setenv("OMP_NUM_THREADS", "12")
    limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "12"
    machine.delenv("OMP_NUM_THREADS")
    limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "4"
    share = threads_for(2)
    assert share["OMP_NUM_THREADS"] == "2", "the quota is divided, and is not a number of the user's"

    machine.setattr(cores, "cpu_quota", lambda: 8.0)
    limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "8", "a process started here may have another quota"
    for name, value in share.items():
        machine.setenv(name, value)
    limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "2", "but a share stays"

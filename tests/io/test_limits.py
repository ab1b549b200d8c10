"""The memory limit of a process: that of the machine or of its control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from psannlm.io import limits
from psannlm.io.limits import cgroup_limit_bytes, describe_memory, machine_memory_bytes

UNLIMITED = str((1 << 63) - 4096)  # what version 1 says


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        ("0::/\n", {"memory.max": "2000000000\n"}, 2_000_000_000),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/user/job\n", {"memory.max": "max", "user/memory.max": "3000", "user/job/memory.max": "max"}, 3000),
        ("0::/user/job\n", {"user/memory.max": "3000", "user/job/memory.max": "2000"}, 2000),
        ("0::/docker/abc\n", {"memory.max": "5000"}, 5000),
        ("5:cpu,memory:/job\n", {"memory/job/memory.limit_in_bytes": "700"}, 700),
        ("5:memory:/\n0::/\n", {"memory/memory.limit_in_bytes": UNLIMITED, "memory.max": "900"}, 900),
        ("5:memory:/\n", {"memory/memory.limit_in_bytes": UNLIMITED}, None),
        ("5:cpu:/job\n", {"memory/job/memory.limit_in_bytes": "700"}, None),
        ("0::/../../x\n", {"x/memory.max": "12"}, 12),
        ("nonsense", {"memory.max": "1"}, None),
        ("", {}, None),
    ],
)
def test_the_lowest_limit_of_all_groups_counts(
    membership: str, files: dict[str, str], limit: int | None, tmp_path: Path
) -> None:
    (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    assert cgroup_limit_bytes(tmp_path / "cgroup", tmp_path / "root") == limit
    assert cgroup_limit_bytes(tmp_path / "missing", tmp_path / "root") is None


@pytest.mark.parametrize(
    ("physical", "group", "memory", "said"),
    [
        (8_000_000_000, None, 8_000_000_000, "this machine has 8.0 GB"),
        (8_000_000_000, 2_000_000_000, 2_000_000_000, "a cgroup limits this process to 2.0 GB"),
        (8_000_000_000, 9_000_000_000, 8_000_000_000, "this machine has 8.0 GB"),
        (None, None, None, "the memory of this machine is unknown"),
    ],
)
def test_a_group_lowers_the_memory_of_the_machine(
    physical: int | None, group: int | None, memory: int | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_physical_bytes", lambda: physical)
    monkeypatch.setattr(limits, "cgroup_limit_bytes", lambda: group)
    assert machine_memory_bytes() == memory
    assert describe_memory() == said

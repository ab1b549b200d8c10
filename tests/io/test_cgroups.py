"""The CPU quota of a process's control groups, of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from psannlm.io.cgroups import cpu_quota


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/job\n", {"cpu.max": "max 100000", "a/cpu.max": "400000 100000", "a/job/cpu.max": "800000 100000"}, 4.0),
        ("4:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ("4:cpu,cpuacct:/j\n", {"cpu,cpuacct/j/cpu.cfs_quota_us": "9", "cpu,cpuacct/j/cpu.cfs_period_us": "3"}, 3.0),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("4:memory:/\n", {"cpu/cpu.cfs_quota_us": "1", "cpu/cpu.cfs_period_us": "1"}, None),
        ("0::/\n", {"cpu.max": "100000 0"}, None),
        ("0::/\n", {"cpu.max": "garbage"}, None),
        ("", {}, None),
    ],
)
def test_cpu_quota_is_lowest_of_all_groups(
    membership: str, files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    assert cpu_quota(tmp_path / "cgroup", tmp_path / "root") == quota
    assert cpu_quota(tmp_path / "missing", tmp_path / "root") is None

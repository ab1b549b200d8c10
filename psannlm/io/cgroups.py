"""Limits of this process's control groups (versions 1 and 2), as containers and batch systems set them.

All of ``/proc`` and ``/sys`` is optional: where a file is missing, there is no limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")
# Version 1 reports a number near 2 ** 63 for "no limit".
_NO_LIMIT = 1 << 60


def memory_limit_bytes(proc: Path = _PROC, root: Path = _ROOT) -> int | None:
    """Return the lowest memory limit of this process's control groups in bytes, or None."""
    limits = []
    for version, group in _groups("memory", proc, root):
        text = _read_text(group / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
        if text.isdecimal() and int(text) < _NO_LIMIT:
            limits.append(int(text))
    return min(limits, default=None)


def cpu_quota(proc: Path = _PROC, root: Path = _ROOT) -> float | None:
    """Return the lowest CPU quota of this process's control groups, in cores (1.5: one and a half), or None."""
    quotas = []
    for version, group in _groups("cpu", proc, root):
        if version == 2:
            words = _read_text(group / "cpu.max").split()
        else:
            words = [_read_text(group / "cpu.cfs_quota_us"), _read_text(group / "cpu.cfs_period_us")]
        # No limit is "max 100000" in version 2 and -1 in version 1.
        if len(words) == 2 and all(word.isdecimal() and int(word) > 0 for word in words):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _groups(controller: str, proc: Path, root: Path) -> Iterator[tuple[int, Path]]:
    """Yield (version, folder) of the groups that limit this process: its own and the parents of that."""
    for line in _read_text(proc).splitlines():
        _, *rest = line.split(":", 2)
        if len(rest) < 2:
            continue
        controllers, group = rest
        if controllers == "":
            version, top = 2, root
        elif controller in controllers.split(","):
            # The folder has the name of all controllers that are mounted together, with a link for each.
            version, top = 1, next((path for name in (controller, controllers) if (path := root / name).is_dir()), root)
        else:
            continue
        parts = [part for part in group.split("/") if part and part != ".."]
        # Within a container the group's own path may not exist.
        for depth in range(len(parts) + 1):
            yield version, top.joinpath(*parts[:depth])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""

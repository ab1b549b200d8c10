"""Resident memory of a process and all that it started, from /proc."""

from __future__ import annotations

from pathlib import Path

_PROC = Path("/proc")


def tree_of(pid: int) -> list[int]:
    """Return ``pid`` and its descendants; none where there is no /proc (not Linux) or the process has ended."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir() if _PROC.is_dir() else ():
        if entry.name.isdecimal():
            try:
                # The name in parentheses may hold any character; state and parent follow it.
                fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            except OSError:
                continue  # ended meanwhile
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    if not (_PROC / str(pid)).is_dir():
        return []
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def tree_resident_bytes(pid: int) -> int | None:
    """Return the memory that ``pid`` and its descendants hold together; None where it cannot be known.

    Pages that several of them share count once: each process adds its proportional set size.
    """
    total = 0
    for member in tree_of(pid):
        try:
            lines = (_PROC / str(member) / "smaps_rollup").read_text(encoding="ascii", errors="replace").splitlines()
        except OSError:
            continue  # ended meanwhile, or of another user
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total or None

"""Resident memory of this process, now and at its peak, without loading torch."""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]

_STATUS = Path("/proc/self/status")


def resident_bytes() -> tuple[int, int] | None:
    """Return the resident memory of this process, now and at its peak; None where there is no /proc (not Linux)."""
    if not _STATUS.is_file():
        return None
    lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def peak_resident_bytes() -> int | None:
    """Return the highest resident memory of this process so far; None where the system does not report it."""
    # getrusage would count what the parent held when it started this process: only the fallback.
    if (resident := resident_bytes()) is not None:
        return resident[1]
    if resource is None:
        return None
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024

"""Bounds on sizes that a file names, compared before any work is done with them; one place for all of them.

Files come from anywhere. A number in one may ask for memory or time out of all proportion to the file, so each is held
against a bound here, or against what the machine has, before anything is read, hashed or allocated.
"""

from __future__ import annotations

import os
from contextlib import suppress

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]
from pathlib import Path

# Positions that the taps of a short convolution may reach back in one step: beyond any context that is trained.
MAX_DILATION = 1 << 20
# Positions that one convolution keeps while decoding: (kernel_size - 1) * dilation.
MAX_CONV_REACH = 1 << 24
# Entries of a vocabulary; the largest in use have about one million.
MAX_VOCAB_SIZE = 1 << 24
# Parts of a corpus that are prepared apart.
MAX_PARTS = 1 << 16
MAX_TOKENIZER_BYTES = 256 << 20
# Files that a command may have open at a time, where the system lets it: each worker process takes a few.
OPEN_FILES = 1 << 16
# Values of a JSON header: each costs some 60 bytes once it is parsed, so that 64 MB of them would take gigabytes.
MAX_HEADER_VALUES = 1 << 20
# A model file up to this size is hashed before its shapes are judged, so that damage is called damage.
HASHED_FIRST_BYTES = 1 << 30
# Text that is held as a whole line, JSON record, prompt or Parquet cell. Plain text is read in parts and may be longer.
MAX_LINE_BYTES = 64 << 20
# All prompts of one file: every one of them is held until it is answered.
MAX_PROMPTS_BYTES = 64 << 20
# What a zstd frame may ask to be remembered: the most that the library can be told, and what zstd --long=31 writes.
MAX_ZSTD_WINDOW_BYTES = 1 << 31
# Where the memory of the machine is unknown.
_ASSUMED_MEMORY_BYTES = 8 << 30


def max_held_bytes() -> int:
    """Return the bytes of text that a corpus may have where all of it is held in memory: half of the machine's."""
    return (machine_memory_bytes() or _ASSUMED_MEMORY_BYTES) // 2


def max_document_bytes() -> int:
    """Return the bytes that one document may have where it is held whole: a quarter of the machine's memory."""
    return (machine_memory_bytes() or _ASSUMED_MEMORY_BYTES) // 4


# What version 1 of control groups says where nothing is limited is near 2 ** 63.
_NO_LIMIT = 1 << 60


def json_values(content: bytes) -> int:
    """Return an upper bound on the number of values in a JSON text, found without parsing it."""
    return 1 + sum(content.count(mark) for mark in (b",", b":", b"[", b"{"))


def machine_memory_bytes() -> int | None:
    """Return the memory that this process may use in bytes: the machine's, or less where a cgroup limits it.

    None where the system does not tell.
    """
    found = [each for each in (_physical_bytes(), cgroup_limit_bytes()) if each is not None]
    return min(found, default=None)


def describe_memory() -> str:
    """Return what :func:`machine_memory_bytes` found, in words."""
    memory, limit = machine_memory_bytes(), cgroup_limit_bytes()
    if memory is None:
        return "the memory of this machine is unknown"
    where = "a cgroup limits this process to" if memory == limit else "this machine has"
    return f"{where} {memory / 1e9:,.1f} GB"


def _physical_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def raise_open_files() -> None:
    """Raise the soft limit of open files to ``OPEN_FILES``, as far as the hard limit allows; for commands, not the API.

    Shells set it to 1,024 or 256, which many workers or runs at a time exceed.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # macOS has a lower limit of its own that it does not name; then the soft limit stays.
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def cgroup_limit_bytes(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the lowest memory limit of this process's control groups (both versions), as of containers, or None."""
    limits = []
    for line in _read_text(proc).splitlines():
        _, *rest = line.split(":", 2)
        if len(rest) < 2:
            continue
        controllers, group = rest
        if controllers == "":
            top, file = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, file = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        parts = [part for part in group.split("/") if part and part != ".."]
        # A group is limited by all groups above it too; within a container its own path may not be there.
        for depth in range(len(parts) + 1):
            text = _read_text(top.joinpath(*parts[:depth], file)).strip()
            if text.isdecimal() and int(text) < _NO_LIMIT:
                limits.append(int(text))
    return min(limits, default=None)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""

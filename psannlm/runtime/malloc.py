"""How the C library is told when to give free memory back to the system; elsewhere than on Linux nothing is done.

What goes back and comes again is cleared by the system each time, page by page: that is the price of a process that
never holds more than it uses. glibc sets its limits itself as blocks come and go, and neither suits work that takes and
frees the same megabytes over and over.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT_WITH_FLAT_MEMORY = 32 << 20
_ALL = (1 << 31) - 1
# What a user may have set: theirs holds.
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def return_large_blocks() -> None:
    """Have free memory beyond 32 MB, and every block of as much, returned to the system.

    For work on a stream of any length: left to itself, glibc would keep what is free between blocks in use, and memory
    would creep up with the length of a corpus. Limits of 128 KB took a fifth of the time of encoding.
    """
    _set(_M_TRIM_THRESHOLD, _KEPT_WITH_FLAT_MEMORY)
    _set(_M_MMAP_THRESHOLD, _KEPT_WITH_FLAT_MEMORY)
    _set(_M_ARENA_MAX, 2)


def keep_freed_memory() -> None:
    """Have free memory kept for the next block, of up to 2 GB at a time.

    For training on a CPU, where every step takes and frees the same tensors (docs/research/log.md). A variable of the
    environment that settles it otherwise holds.
    """
    if not any(name in os.environ for name in _OWN_SETTINGS):
        _set(_M_TRIM_THRESHOLD, _ALL)
        _set(_M_MMAP_THRESHOLD, _ALL)


def _set(setting: int, value: int) -> None:
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            library.mallopt(setting, value)

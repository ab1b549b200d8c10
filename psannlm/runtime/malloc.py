"""Settings of glibc malloc: return freed memory to the system early, or retain it. Linux only.

Memory that was returned is zeroed page by page when it is allocated again: the price of a small resident size. The
default limits of glibc change as blocks are freed, which suits neither a long stream of texts nor a training step that
allocates and frees the same megabytes again and again.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_TRIM_BYTES = 32 << 20
_MAX_BYTES = (1 << 31) - 1
# Environment variables of the user, which take precedence.
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def trim_aggressively() -> None:
    """Return free memory beyond 32 MB, and every freed block of that size, to the system.

    For streams of any length: otherwise glibc keeps free memory between used blocks, and the resident size grows with
    the length of the corpus. Limits of 128 KB cost a fifth of the encoding time.
    """
    _set(_M_TRIM_THRESHOLD, _TRIM_BYTES)
    _set(_M_MMAP_THRESHOLD, _TRIM_BYTES)
    _set(_M_ARENA_MAX, 2)


def retain_freed_memory() -> None:
    """Retain freed memory for the next allocation, in blocks of up to 2 GB.

    For training on a CPU, where every step allocates and frees the same tensors (docs/research/log.md). Does nothing if
    an environment variable sets these limits.
    """
    if not any(name in os.environ for name in _OWN_SETTINGS):
        _set(_M_TRIM_THRESHOLD, _MAX_BYTES)
        _set(_M_MMAP_THRESHOLD, _MAX_BYTES)


def _set(setting: int, value: int) -> None:
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            library.mallopt(setting, value)

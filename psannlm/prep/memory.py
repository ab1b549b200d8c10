"""How the C library is told to give large blocks of memory back."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT_BYTES = 32 << 20


def return_large_blocks() -> None:
    """Have free memory beyond 32 MB, and every block of as much, returned to the system.

    glibc raises both limits by itself as blocks come and go, and then keeps what is free between those in use: memory
    would creep up with the length of a corpus. Lower limits cost time: what goes back and comes again is cleared each
    time, which took a fifth of the work of encoding at 128 KB. Elsewhere nothing is done.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            for setting, value in (
                (_M_TRIM_THRESHOLD, _KEPT_BYTES),
                (_M_MMAP_THRESHOLD, _KEPT_BYTES),
                (_M_ARENA_MAX, 2),
            ):
                library.mallopt(setting, value)

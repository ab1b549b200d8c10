"""How the C library is told to give large blocks of memory back."""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_LARGE_BYTES = 1 << 18


def return_large_blocks() -> None:
    """Have every block of a quarter of a megabyte or more returned to the system once it is free.

    glibc raises that limit to 32 MB by itself as blocks come and go, and then keeps what is free between those in use:
    memory would creep up with the length of a corpus. Elsewhere nothing is done.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            library.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
            library.mallopt(_M_ARENA_MAX, 2)

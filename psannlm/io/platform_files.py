"""Locks, flags and reads of open files that differ between platforms; each is looked up, and none is required.

``fcntl`` exists on POSIX systems only. Windows locks ranges of bytes instead, which other processes cannot read
meanwhile: the byte that is locked lies far behind any content.
"""

from __future__ import annotations

import os
import sys

if sys.platform == "win32":
    import msvcrt
else:
    try:
        import fcntl
    except ImportError:  # a system with neither
        fcntl = None  # type: ignore[assignment]

# Flags for os.open: no link is followed, and opening a FIFO does not block. Windows has none of the first three.
SAFE_FLAGS = (
    getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_LOCKED_BYTE = 1 << 30


def lock_exclusively(handle: int, *, wait: bool) -> bool:
    """Lock an open file until it is closed; return whether the platform has locks.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is false.
        OSError: the file system has no locks.
    """
    if sys.platform == "win32":
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(error.errno, error.strerror) from error
        return True
    if fcntl is None:
        return False
    fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    return True


def read_start(handle: int, n_bytes: int) -> bytes:
    """Return the first ``n_bytes`` of an open file and leave its position at 0; ``os.pread`` is POSIX only."""
    os.lseek(handle, 0, os.SEEK_SET)
    content = os.read(handle, n_bytes)
    os.lseek(handle, 0, os.SEEK_SET)
    return content

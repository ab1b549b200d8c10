"""Read-only memory maps of files without an open file descriptor.

Before Python 3.13, ``mmap`` keeps a descriptor for each map, and a process may have only 1,024 or 256 of them: fewer
than the shards of a large corpus. The operating system needs none once a file is mapped (POSIX mmap).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import weakref
from functools import cache
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray


def map_bytes(file: BinaryIO, n_bytes: int) -> NDArray[np.uint8]:
    """Map the first ``n_bytes`` of an open file; the array, (n_bytes,), outlives the descriptor and is read-only.

    Raises:
        OSError: the file is shorter (EINVAL), or the system refuses another map (ENOMEM).
    """
    if not 0 < n_bytes <= os.fstat(file.fileno()).st_size:
        raise OSError(errno.EINVAL, "the file is shorter than the requested map")
    if sys.version_info >= (3, 13):
        buffer: Any = mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ, trackfd=False)
    elif os.name == "posix":
        buffer = _posix_map(file.fileno(), n_bytes)
    else:
        buffer = mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ)
    # A write to such memory kills the process, so the array must not be made writable.
    return np.frombuffer(memoryview(buffer).toreadonly(), dtype=np.uint8)


def _posix_map(descriptor: int, n_bytes: int) -> Any:
    """Return a ctypes array over a shared, read-only map, which is unmapped when the array is freed."""
    library = _library()
    address = library.mmap(None, n_bytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    buffer = (ctypes.c_ubyte * n_bytes).from_address(address)
    # Not at exit: other threads may still read, and the operating system unmaps everything anyway.
    weakref.finalize(buffer, library.munmap, address, n_bytes).atexit = False
    return buffer


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    # off_t is a long with both sizes of pointers.
    library.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    library.mmap.restype = ctypes.c_void_p
    library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    library.munmap.restype = ctypes.c_int
    return library

"""Pauses of Python's garbage collection while a command loads what stays until it ends."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def pausing_collection() -> Iterator[None]:
    """Search for no unreachable objects inside, and never again among those that are there afterwards.

    Importing torch makes about a million objects, which Python searches again and again as their number grows: a tenth
    of the time of the import. Objects without cycles are freed as always.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.freeze()
            gc.enable()

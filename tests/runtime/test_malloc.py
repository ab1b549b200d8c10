"""Freed memory: returned to the system in prep, retained in training, unless the user sets otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's limits are set on Linux only")

# Takes and frees 512 MB in blocks of 8 MB, and tells in MB what stays, and the page faults of doing so once more.
PROGRAM = """
import ctypes, resource, sys
from psannlm.runtime import malloc as memory
library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def work():
    blocks = [library.malloc(8 << 20) for _ in range(64)]
    for block in blocks:
        ctypes.memset(block, 1, 8 << 20)
    for block in blocks:
        library.free(block)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
getattr(memory, sys.argv[1])()
work()
with open("/proc/self/status") as status:
    held = next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmRSS"))
before = faults()
work()
print(held, faults() - before)
"""
PAGES = (512 << 20) // os.sysconf("SC_PAGESIZE")


def held_and_faults(function: str, **environment: str) -> tuple[int, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, function],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    held, faults = done.stdout.split()
    return int(held), int(faults)


def test_retain_freed_memory_reuses_pages() -> None:
    held, faults = held_and_faults("retain_freed_memory")
    assert held > 500
    assert faults < PAGES / 50, "what was freed was cleared again"


def test_trim_aggressively_returns_freed_memory() -> None:
    held, _ = held_and_faults("trim_aggressively")
    assert held < 100


def test_malloc_settings_respect_environment() -> None:
    held, faults = held_and_faults(
        "retain_freed_memory", MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072"
    )
    assert held < 100
    assert faults >= PAGES * 0.9

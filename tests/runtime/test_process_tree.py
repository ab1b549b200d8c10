"""Processes below another one, and the memory that they hold together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from psannlm.runtime.process_tree import tree_of, tree_resident_bytes

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")

# A parent that starts a child, which holds 40 MB and reports that it does.
_PROGRAM = """
import subprocess, sys
child = "x = bytearray(b'1') * 40_000_000; print(__import__('os').getpid(), flush=True); input()"
subprocess.run([sys.executable, "-S", "-c", child])
"""


def test_process_tree_counts_memory_of_children() -> None:
    command = [sys.executable, "-S", "-c", _PROGRAM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert tree_of(process.pid) == [process.pid, child]
        both, alone = tree_resident_bytes(process.pid), tree_resident_bytes(child)
        process.stdin.close()
    assert both is not None
    assert alone is not None
    assert 40e6 < alone < both < 200e6
    assert tree_of(process.pid) == []
    assert tree_resident_bytes(process.pid) is None

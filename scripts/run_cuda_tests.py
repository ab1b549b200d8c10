#!/usr/bin/env python3
"""The whole test suite with CUDA as its device: ``run_cuda_tests.py [--out DIR] [options of pytest]``.

Tests of training train on the GPU, with kernels that repeat themselves, and those marked ``gpu`` are run; what forks,
compares several processes on one machine, or asks for a CPU's own passes, stays on the CPU.
"""

from __future__ import annotations

import sys

from suite import run_suite

if __name__ == "__main__":
    sys.exit(run_suite("the whole suite", []))

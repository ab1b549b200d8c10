#!/usr/bin/env python3
"""The whole test suite with CUDA as its device: ``run_cuda_tests.py [--out DIR] [options of pytest]``.

Training tests run on the GPU with deterministic kernels, and those marked ``gpu`` are included. Tests that fork,
compare several processes on one machine or are for CPU kernels stay on the CPU.
"""

from __future__ import annotations

import sys

from suite import run_suite

if __name__ == "__main__":
    sys.exit(run_suite("the whole suite", []))

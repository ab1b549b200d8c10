#!/usr/bin/env python3
"""Run the tests that need a GPU, marked ``gpu``: ``run_gpu_tests.py [--out DIR] [options of pytest]``."""

from __future__ import annotations

import sys

from suite import run_suite

if __name__ == "__main__":
    sys.exit(run_suite("the tests of the GPU", ["-m", "gpu"], keeps_outputs=True))

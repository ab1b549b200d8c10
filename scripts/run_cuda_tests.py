"""The whole test suite where there is a GPU: ``run_cuda_tests.py [--out DIR] [options of pytest]``."""

from __future__ import annotations

import sys

from suite import run_suite

if __name__ == "__main__":
    sys.exit(run_suite("the whole suite", []))

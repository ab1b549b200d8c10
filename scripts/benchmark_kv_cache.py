#!/usr/bin/env python3
"""The older ``python scripts/benchmark_kv_cache.py [options]`` to ``psannlm bench-kv [options]``."""

from __future__ import annotations

import sys

from psannlm.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench-kv", *sys.argv[1:]]))

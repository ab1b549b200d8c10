#!/usr/bin/env python3
"""Former name of ``psannlm bench-kv [options]``."""

from __future__ import annotations

import sys

from psannlm.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench-kv", *sys.argv[1:]]))

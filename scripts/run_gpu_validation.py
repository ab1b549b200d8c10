"""The older ``python scripts/run_gpu_validation.py [options]`` to ``psannlm gpu-validate [options]``."""

from __future__ import annotations

import sys

from psannlm.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["gpu-validate", *sys.argv[1:]]))

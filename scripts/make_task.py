#!/usr/bin/env python3
"""Write the text of an algorithmic task, one document per line, determined by seed and size.

python scripts/make_task.py {modular_addition,parity,copying} --out FILE [--bytes N] [--seed N] [--if-missing]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from psannlm.data.synthetic.algorithmic import TASKS, write_task
from psannlm.data.synthetic.writer import add_text_options, write_made_text


def main(arguments: list[str] | None = None) -> int:
    """Write the file, print its path, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--out", type=Path, required=True)
    add_text_options(parser, 4_000_000)
    options = parser.parse_args(arguments)
    return write_made_text(parser, options, lambda seed, n_bytes: write_task(options.task, seed, n_bytes))


if __name__ == "__main__":
    sys.exit(main())

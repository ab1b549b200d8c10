#!/usr/bin/env python3
"""Write datasets/lm/tiny_books.txt: a synthetic corpus of stories in regular English, determined by seed and size.

python scripts/make_tiny_corpus.py [--out FILE] [--bytes N] [--seed N] [--if-missing]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from psannlm.data.synthetic.stories import write_books
from psannlm.data.synthetic.writer import add_text_options, write_made_text

DEFAULT_PATH = Path("datasets/lm/tiny_books.txt")


def main(arguments: list[str] | None = None) -> int:
    """Write the file, print its path, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_PATH, help=f"default: {DEFAULT_PATH}")
    add_text_options(parser, 50_000_000)
    options = parser.parse_args(arguments)
    return write_made_text(parser, options, write_books)


if __name__ == "__main__":
    sys.exit(main())

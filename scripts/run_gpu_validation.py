#!/usr/bin/env python3
"""Run ``psannlm gpu-validate [options]``; ``--out DIR`` is the parent of the dated folder, ``DIR/<time>/``."""

from __future__ import annotations

import sys
from pathlib import Path

from psannlm.__main__ import main
from psannlm.io.run_metadata import timestamp


def translate(arguments: list[str]) -> list[str]:
    """Return the arguments of ``psannlm gpu-validate``, whose ``--out`` names the folder itself."""
    translated = list(arguments)
    for at, argument in enumerate(arguments):
        name, is_joined, value = argument.partition("=")
        if name != "--out":
            continue
        if is_joined:
            translated[at] = f"--out={Path(value) / timestamp()}"
        elif at + 1 < len(arguments):
            translated[at + 1] = str(Path(arguments[at + 1]) / timestamp())
    return ["gpu-validate", *translated]


if __name__ == "__main__":
    sys.exit(main(translate(sys.argv[1:])))

#!/usr/bin/env python3
"""Compare tokenizer backends on a corpus: ``compare_tokenizers.py [--corpus PATH] [--repeat N] [options]``.

Other options are those of ``psannlm bench-tokenizers``. Two differ: ``--repeat N`` is how often the text of the corpus
is repeated (``--corpus-repeat`` there; counted runs are ``--repeats`` in both), and without ``--corpus`` it is the
sample texts of the examples. A line of a ``.txt`` file is a document, some of which are held out before the rest is
repeated.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from psannlm.__main__ import main

SAMPLE_TEXTS = Path(__file__).resolve().parents[1] / "examples" / "lm" / "sample_texts.txt"


def translate(arguments: list[str]) -> list[str]:
    """Return the equivalent arguments of ``psannlm bench-tokenizers``."""
    names = [argument.partition("=")[0] for argument in arguments]
    translated = [
        "--corpus-repeat" + argument.removeprefix("--repeat") if name == "--repeat" else argument
        for name, argument in zip(names, arguments, strict=True)
    ]
    if "--corpus" not in names:
        translated += ["--corpus", os.path.relpath(SAMPLE_TEXTS)]
    if "--per-line" not in names:
        translated.append("--per-line")
    return ["bench-tokenizers", *translated]


if __name__ == "__main__":
    sys.exit(main(translate(sys.argv[1:])))

"""The older ``python scripts/compare_tokenizers.py [options]`` to ``psannlm bench-tokenizers [options]``."""

from __future__ import annotations

import sys

from psannlm.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench-tokenizers", *sys.argv[1:]]))

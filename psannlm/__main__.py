"""``python -m psannlm``: the same as the command ``psannlm``; the one place where the library names its commands."""

from __future__ import annotations

import sys

from psannlm.commands.app import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())

"""``python -m psannlm``: the same as the command ``psannlm``; the one place where the library names its commands."""

from __future__ import annotations

import sys

from psannlm.commands.app import main

__all__ = ["main"]

if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        # Ranks are started this way. Not imported here: it would bring torch along for every other command.
        distributed = sys.modules.get("psannlm.runtime.distributed")
        if distributed is not None and (end.code is None or isinstance(end.code, int)):
            distributed.leave_group(end.code or 0)
        raise

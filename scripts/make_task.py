"""Write the text of a counting task, a document a line, the same for the same seed and size.

python scripts/make_task.py {modular_addition,parity,copying} --out FILE [--bytes N] [--seed N] [--if-missing]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from psannlm.benchmarks.counting_tasks import TASKS, write_task
from psannlm.errors import PsannlmError
from psannlm.storage import replacing


def main(arguments: list[str] | None = None) -> int:
    """Write the file and say so; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bytes", type=int, default=4_000_000, dest="n_bytes", help="at most; default: 4,000,000")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--if-missing", action="store_true", help="leave a file that is there as it is")
    options = parser.parse_args(arguments)
    if options.n_bytes < 1:
        parser.error("--bytes must be 1 or more")
    if options.if_missing and options.out.exists():
        sys.stderr.write(f"{options.out} is there already\n")
        return 0
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(options.out) as temporary, open(temporary, "w", encoding="ascii") as file:
            file.writelines(write_task(options.task, options.seed, options.n_bytes))
    except PsannlmError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stderr.write(f"{options.out}: {options.out.stat().st_size:,} bytes, seed {options.seed}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

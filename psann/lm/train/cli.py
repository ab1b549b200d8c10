"""``python -m psann.lm.train.cli --config X [options]`` of earlier documents: runs ``psannlm train X [options]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

OPTION = "--config"


def translate(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of ``psannlm`` that mean the same: the value of ``--config`` becomes the positional CONFIG.

    Everything else is handed on as it is, so that ``psannlm train`` itself judges it.
    """
    config: list[str] = []
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == OPTION:
            config += [value for value in [next(remaining, None)] if value is not None]
        elif argument.startswith(f"{OPTION}="):
            config.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    return ["train", *config, *rest]


def main() -> None:
    """Run ``psannlm train`` with this process's arguments."""
    from psannlm.__main__ import main as psannlm

    sys.exit(psannlm(translate(sys.argv[1:])))


if __name__ == "__main__":
    main()

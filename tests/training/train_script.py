"""A run in a process of its own, which exits as the command line does.

``train_script.py CONFIG [slow | hold-save STEP | memory MEGABYTES]``
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

from psannlm.config.run import load_config
from psannlm.errors import PsannlmError
from psannlm.training import checkpoint
from psannlm.training.callbacks import Callback, StepEvent
from psannlm.training.run import train


class Slow(Callback):
    """Says each step, and gives the test time to act on it."""

    def on_step(self, event: StepEvent) -> None:
        say(f"step {event.step}")
        time.sleep(0.15)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def hold_save(step: int) -> None:
    """Stop for good between the first and the second file of the checkpoint of ``step``."""
    original = checkpoint.write_tensors

    def slow(path: Path, *args: object) -> str:
        if path.parent.name == f"step_{step:08d}":
            say("saving")
            time.sleep(60)
        return original(path, *args)  # type: ignore[arg-type]

    checkpoint.write_tensors = slow  # type: ignore[assignment]


def allow_memory(megabytes: int) -> None:
    """Let the process have so much more memory than it has now, and no more."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + megabytes * 1_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    if sys.argv[2:3] == ["hold-save"]:
        hold_save(int(sys.argv[3]))
    if sys.argv[2:3] == ["memory"]:
        allow_memory(int(sys.argv[3]))
    callbacks = [Slow()] if sys.argv[2:3] in (["slow"], ["hold-save"]) else []
    try:
        train(load_config(sys.argv[1]), callbacks=callbacks)
    except PsannlmError as error:
        say(f"{type(error).__name__}: {error}")
        sys.exit(error.exit_code)
    say("done")

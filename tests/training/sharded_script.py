"""One rank that trains from several configurations: ``sharded_script.py JOBS``, a JSON list; a JSON line for each.

A job is ``{"config": path, "resume": ..., "hold": [rank, save]}``; a rank with ``hold`` stops in that save, counted
from 1, until it is killed.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from psannlm.config.run import load_config
from psannlm.generation.generate import draw_samples
from psannlm.models import tensorfile
from psannlm.training import run

RANK = int(os.environ["RANK"])
LIMIT_S = 300


def hold_save(rank: int, save: int) -> None:
    """Let ``rank`` stop for good in a save, after its shards of the weights are written."""
    original, calls = tensorfile.write_shards, []

    def write(path: Path, tensors: Any) -> dict[str, str]:
        found = original(path, tensors)
        calls.append(path.name)
        if RANK == rank and calls.count("model.safetensors") == save:
            sys.stdout.write("saving\n")
            sys.stdout.flush()
            time.sleep(LIMIT_S)
        return found

    tensorfile.write_shards = write


if __name__ == "__main__":
    # Should ranks ever wait for each other without end, the test shall fail with the place they stand at.
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if "hold" in job:
            hold_save(*job["hold"])
        result = run.train(load_config(job["config"]), resume=job.get("resume", "auto"), sampler=draw_samples)
        sys.stdout.write(json.dumps({"steps": result.steps, "checkpoint": str(result.checkpoint)}) + "\n")
        sys.stdout.flush()

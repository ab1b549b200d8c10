"""Peak memory of training a candidate, measured in a process of its own.

Run as a module, it is that process: JSON settings on stdin, the number of bytes on stdout.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from psannlm.benchmarks.training.candidates import Candidate, ThroughputSettings, TrainingRun
from psannlm.config.model import ModelConfig
from psannlm.errors import PsannlmError
from psannlm.runtime.malloc import retain_freed_memory
from psannlm.runtime.processes import python_command
from psannlm.runtime.resident_memory import resident_bytes

_STEPS = 3
# Writing 5 to it resets the peak of the resident memory to its present value.
_CLEAR = Path("/proc/self/clear_refs")
# Sizes of the warm-up model, which loads libraries and compiler before anything is measured.
_SMALL = {"d_model": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "d_mlp": 64, "vocab_size": 64}


def peak_step_bytes(candidate: Candidate, settings: ThroughputSettings, device: torch.device) -> int | None:
    """Return the peak bytes of weights, gradients, optimizer state, activations and scratch together.

    On a GPU: the peak that torch allocated. On a CPU: the peak resident memory of a process that only trains this
    model, less its resident memory before the model was built, with all libraries loaded. None on a CPU without
    Linux's ``/proc``.

    Raises:
        PsannlmError: the process failed; the message ends with the last line of its stderr.
    """
    if device.type == "cpu" and not _CLEAR.exists():
        return None
    description = {
        "candidate": asdict(candidate),
        "model": settings.model.model_dump(mode="json"),
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("model", "tokens_per_step")},
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        python_command("psannlm.benchmarks.training.peak_memory"),
        input=json.dumps(description),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PsannlmError(f"measuring the peak memory of {candidate.name} failed: {last}")
    return int(done.stdout.split()[-1])


def measure_here(candidate: Candidate, settings: ThroughputSettings, device: torch.device) -> int:
    """Return the same for this process, which must not have trained a large model before."""
    _warm_up(candidate, settings, device)
    gc.collect()
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
    else:
        before = _resident()[0]
    run = TrainingRun(candidate, settings, device)
    run.step()
    # The compiler's temporary memory is not part of training; what it keeps is.
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device) if is_cuda else _forget_peak()
    for _ in range(_STEPS):
        run.step()
    return (torch.cuda.max_memory_allocated(device) if is_cuda else _resident()[1]) - before


def _warm_up(candidate: Candidate, settings: ThroughputSettings, device: torch.device) -> None:
    """Train a tiny model of the same kind, so that all code is loaded."""
    small = settings.model.model_copy(update=_SMALL)
    run = TrainingRun(candidate, replace(settings, model=small, seq_len=16, batch_tokens=32), device)
    run.step()
    run.step()


def _forget_peak() -> None:
    _CLEAR.write_text("5", encoding="ascii")


def _resident() -> tuple[int, int]:
    """Return the resident bytes of this process, now and at the peak. Raises PsannlmError without ``/proc``."""
    resident = resident_bytes()
    if resident is None:
        raise PsannlmError("/proc/self/status, which holds the resident memory, does not exist")
    return resident


def _main() -> None:
    given: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(given["threads"])
    retain_freed_memory()
    rest: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given["settings"].items()}
    settings = ThroughputSettings(ModelConfig.model_validate(given["model"]), **rest)
    peak = measure_here(Candidate(**given["candidate"]), settings, torch.device(given["device"]))
    sys.stdout.write(f"{peak}\n")


if __name__ == "__main__":
    _main()

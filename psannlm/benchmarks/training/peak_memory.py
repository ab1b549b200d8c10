"""A candidate and its settings in; the bytes at the peak of its training, found in a process of its own, out.

Run as a module, it is that process: a description on stdin, one number on stdout.
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
from psannlm.runtime.malloc import keep_freed_memory
from psannlm.runtime.processes import python_command

_STEPS = 3
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Of the rehearsal that loads libraries and compiler before anything is measured.
_SMALL = {"d_model": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "d_mlp": 64, "vocab_size": 64}


def peak_step_bytes(candidate: Candidate, settings: ThroughputSettings, device: torch.device) -> int | None:
    """Return the most memory that weights, gradients, optimiser state, activations and scratch take together.

    On a GPU, what torch had allocated at the peak; on a CPU, the largest resident size of a process that only trains
    this model, less its size before the model was built, with all libraries loaded. None where the system does not
    tell (CPUs elsewhere than on Linux).

    Raises:
        PsannlmError: the process failed; the message ends with its last line.
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
        raise PsannlmError(f"the process that measures the memory of {candidate.name} failed: {last}")
    return int(done.stdout.split()[-1])


def measure_here(candidate: Candidate, settings: ThroughputSettings, device: torch.device) -> int:
    """Return the same for this process, which must have trained nothing of size before."""
    _rehearse(candidate, settings, device)
    gc.collect()
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
    else:
        before = _resident("VmRSS")
    run = TrainingRun(candidate, settings, device)
    run.step()
    # What a compiler needs for a while is no part of training; what it leaves behind is.
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device) if is_cuda else _forget_peak()
    for _ in range(_STEPS):
        run.step()
    return (torch.cuda.max_memory_allocated(device) if is_cuda else _resident("VmHWM")) - before


def _rehearse(candidate: Candidate, settings: ThroughputSettings, device: torch.device) -> None:
    """Train a tiny model of the same kind, so that all code is loaded."""
    small = settings.model.model_copy(update=_SMALL)
    run = TrainingRun(candidate, replace(settings, model=small, seq_len=16, batch_tokens=32), device)
    run.step()
    run.step()


def _forget_peak() -> None:
    _CLEAR.write_text("5", encoding="ascii")


def _resident(name: str) -> int:
    """Bytes that are resident (VmRSS), or were at the peak (VmHWM)."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise PsannlmError(f"{_STATUS} does not tell {name}")


def _main() -> None:
    given: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(given["threads"])
    keep_freed_memory()
    rest = {**given["settings"], "also": tuple(given["settings"]["also"])}
    settings = ThroughputSettings(ModelConfig.model_validate(given["model"]), **rest)
    peak = measure_here(Candidate(**given["candidate"]), settings, torch.device(given["device"]))
    sys.stdout.write(f"{peak}\n")


if __name__ == "__main__":
    _main()

"""Runs of several ranks, each a fork of this process: ``rank_forks.py JOBS``, a JSON list; prints a JSON list.

A job is ``{"configs": [path of each rank], "resume": ...}`` for a run, with ``"fault": [kind, rank, ...]`` for one in
which ranks do what they should not, and with ``"graphs": true`` for one whose compiled graphs are counted; or
``{"count": n_ranks}`` for the numbers of exchanges in a step.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from psannlm.commands.app import main
from psannlm.config.model import ModelConfig
from psannlm.config.run import RankMesh
from psannlm.data.loader import MicroBatch
from psannlm.models.registry import build_model, resolve
from psannlm.runtime import rank_activity, watchdog
from psannlm.runtime.device import Precision
from psannlm.runtime.distributed import World, process_group
from psannlm.runtime.launch import private_store
from psannlm.training import loop, parallel
from psannlm.training import run as training_run
from psannlm.training.optim import OptimizerSet
from psannlm.training.parallel import clip_gradients, shard
from psannlm.training.step import train_step

_SPEC = spec_from_file_location("soak_ranks", Path(__file__).resolve().parents[2] / "scripts" / "soak_ranks.py")
assert _SPEC is not None
assert _SPEC.loader is not None
soak_ranks = module_from_spec(_SPEC)
sys.modules["soak_ranks"] = soak_ranks
_SPEC.loader.exec_module(soak_ranks)

LIMIT_S = 500.0
SLEEP_S = 6.0
FAULTY_STEP = 3


def put_fault(kind: str, is_faulty: bool) -> None:
    """Let this rank do what it should not; every rank notices a stall after three seconds."""
    original = watchdog.StallMonitor
    watchdog.StallMonitor = lambda: original(3)  # type: ignore[assignment,misc]
    if not is_faulty:
        return
    if kind == "code":
        parallel.package_sha256 = lambda: "0" * 64  # type: ignore[assignment]
        return
    if kind.startswith("full at "):
        fill_disk(int(kind.removeprefix("full at ")))
        return
    original_step, calls = loop.train_step, []

    def step(*arguments: Any, **settings: Any) -> Any:
        calls.append(None)
        if len(calls) == FAULTY_STEP and kind == "slow":
            time.sleep(SLEEP_S)
        if len(calls) == FAULTY_STEP and kind == "alone":
            rank_activity.entering_collective()
            dist.barrier()
        return original_step(*arguments, **settings)

    loop.train_step = step


def fill_disk(n_bytes: int) -> None:
    """Let the system refuse this rank, from its second save on, to write beyond ``n_bytes`` in a file."""
    original, calls = loop._save, []

    def save(*arguments: Any) -> None:
        calls.append(None)
        if len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        original(*arguments)

    loop._save = save


def count_graphs(file: Path) -> None:
    """Let this rank write to ``file`` how many graphs it has compiled when its last step is done."""
    from torch._dynamo.utils import counters

    original = training_run.run_steps

    def run_steps(*arguments: Any) -> Any:
        state = original(*arguments)
        file.write_text(str(counters["stats"]["unique_graphs"]), encoding="utf-8")
        return state

    training_run.run_steps = run_steps


def run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    n_ranks = job.get("count") or len(job["configs"])

    def work(rank: int) -> None:
        if "count" in job:
            (folder / f"count_{rank}.json").write_text(json.dumps(count(rank, n_ranks)), encoding="utf-8")
            return
        if "fault" in job:
            put_fault(job["fault"][0], rank in job["fault"][1:])
        if "graphs" in job:
            count_graphs(folder / f"graphs_{rank}.txt")
        main(["train", job["configs"][rank], "--resume", job.get("resume", "auto")])

    began = time.monotonic()
    with private_store(n_ranks) as place:
        # A world of one has no ranks.
        ranks = soak_ranks.fork_ranks(n_ranks, folder, place, work)
        has_ended = ranks.wait(LIMIT_S)
        ranks.kill()
    answer: dict[str, Any] = {"codes": [ranks.codes[rank] for rank in range(n_ranks)] if has_ended else None}
    answer |= {"errors": ranks.errors(), "seconds": time.monotonic() - began}
    answer["said"] = [path.read_text(encoding="utf-8") for path in ranks.outputs]
    if "graphs" in job:
        files = [folder / f"graphs_{rank}.txt" for rank in range(n_ranks)]
        answer["graphs"] = [int(file.read_text()) if file.exists() else 0 for file in files]
    if "count" in job and not any(answer["codes"] or [1]):
        answer["counts"] = [json.loads((folder / f"count_{rank}.json").read_text()) for rank in range(n_ranks)]
    return answer


class Exchanges(TorchDispatchMode):
    """Counts the operations with which sharded gradients are reduced, within replicas and between them."""

    def __init__(self) -> None:
        super().__init__()
        self.scattered = self.reduced = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.scattered += "reduce_scatter" in str(operation)
        self.reduced += "allreduce" in str(operation)
        return operation(*args, **(kwargs or {}))


def count(rank: int, n_ranks: int) -> dict[str, Any]:
    """Count exchanges in a step of three micro-batches, with two replicas; and the norm of a clipped gradient."""
    device = torch.device("cpu")
    config = resolve(ModelConfig(base="respsann", d_model=16, n_layers=2, n_heads=2, vocab_size=17))
    ids = torch.randint(0, 17, (3, 2, 9), generator=torch.Generator().manual_seed(rank))
    batches = [MicroBatch(part[:, :-1], part[:, 1:], 16, None) for part in ids]  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    with process_group(World(rank, rank, n_ranks), device) as world:
        precision = Precision(device, torch.float32, "test")
        model = shard(build_model(config, seed=1), world, precision, RankMesh(2, n_ranks // 2))
        optimizers = OptimizerSet(model, "adamw", 0.0)
        for sync_once in (True, False):
            with Exchanges() as seen:
                scaler = torch.amp.GradScaler("cpu", enabled=False)
                train_step(
                    model,
                    batches,
                    optimizers,
                    precision=precision,
                    scaler=scaler,
                    lr=0.0,
                    grad_clip=1e-3,
                    sync_once=sync_once,
                    world=world,
                )
            found["once" if sync_once else "each"] = [seen.scattered, seen.reduced]
        found["norm"] = float(clip_gradients(model, None))
    return found


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    soak_ranks.import_libraries()
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.stdout.write(json.dumps([run(job, Path(sys.argv[1]).parent) for job in jobs]) + "\n")

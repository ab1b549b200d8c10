#!/usr/bin/env python
"""Time to save the checkpoint of a sharded model: by all ranks in parallel, and gathered by rank 0, in turns.

``bench_sharded_save.py [--ranks 4] [--d-model 1024] [--n-layers 24] [--rounds 3] [--folder DIR]`` starts its ranks
itself, on this machine's CPU. Weights and AdamW's state are random; both ways write the same tensors, flush them to the
disk and hash every byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from psannlm.config.model import ModelConfig
from psannlm.data.loader import Position
from psannlm.io.safetensors_header import build_header
from psannlm.models.accounting import count_parameters
from psannlm.models.artifact import MODEL_FILE
from psannlm.models.registry import build_model, resolve
from psannlm.models.tensorfile import read_tensors
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import Precision
from psannlm.runtime.distributed import World, full_tensor, process_group
from psannlm.training.checkpoint import OPTIMIZER_FILE, TrainerState, save_checkpoint
from psannlm.training.optim import OptimizerSet
from psannlm.training.parallel import shard


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=4, help="number of processes (default 4)")
    parser.add_argument("--d-model", type=int, default=1024, help="model width (default 1024)")
    parser.add_argument("--n-layers", type=int, default=24, help="number of blocks (default 24)")
    parser.add_argument("--rounds", type=int, default=3, help="saves of each kind (default 3)")
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure (default: a temporary one)")
    return parser.parse_args()


def start(options: argparse.Namespace) -> int:
    """Start the ranks, and return the exit code of the first that failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        arguments = [*sys.argv[1:], "--folder", folder]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(options.ranks)}
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, *arguments],
                env={**os.environ, "OMP_NUM_THREADS": "1", **place, "RANK": str(rank)},
            )
            for rank in range(options.ranks)
        ]
        return max(rank.wait() for rank in ranks)


def sharded_model(options: argparse.Namespace, world: World) -> tuple[Transformer, OptimizerSet]:
    """Return a sharded model of random weights, and AdamW after one step."""
    sizes = {"d_model": options.d_model, "n_layers": options.n_layers, "n_heads": options.d_model // 64}
    config = resolve(ModelConfig(base="transformer", vocab_size=32_000, max_seq_len=1024, **sizes))
    source = build_model(config, seed=1, device="cpu" if world.is_main else "meta")
    model = shard(source, world, Precision(torch.device("cpu"), torch.float32, "benchmark"))
    optimizers = OptimizerSet(model, "adamw", 0.1)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    for optimizer in optimizers.optimizers:
        optimizer.step()
    optimizers.zero_grad()
    return model, optimizers


def save_gathered(folder: Path, files: Mapping[str, Mapping[str, Tensor]], world: World) -> None:
    """Gather one tensor after the other, and write and hash them on rank 0: how psannlm saved until this version."""
    dtypes = {torch.float32: "F32", torch.int64: "I64"}
    for name, tensors in files.items():
        if not world.is_main:
            for tensor in tensors.values():
                full_tensor(tensor.detach())
            continue
        header = build_header({key: (dtypes[t.dtype], tuple(t.shape)) for key, t in tensors.items()}, {})
        digest = hashlib.sha256(header)
        with open(folder / name, "wb") as file:
            file.write(header)
            for tensor in tensors.values():
                content = full_tensor(tensor.detach()).contiguous().reshape(-1).view(torch.uint8).numpy().data
                digest.update(content)
                file.write(content)
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class Cost:
    """Seconds of a save, and the processor seconds of the rank that works most and of all ranks."""

    seconds: float
    busiest_cpu_s: float
    all_cpu_s: float


def timed(save: Callable[[], None], world: World) -> Cost:
    """Return the cost of a save, from when all ranks begin until the last one has ended."""
    world.wait()
    began, used = time.monotonic(), time.process_time()
    save()
    own = torch.tensor(time.process_time() - used, dtype=torch.float64)
    world.wait()
    seconds = time.monotonic() - began
    busiest = own.clone()
    dist.all_reduce(busiest, op=dist.ReduceOp.MAX)
    return Cost(seconds, float(busiest), float(world.all_reduce_(own)))


def measure(options: argparse.Namespace) -> None:
    """Save in turns both ways and print the figures, on one of the ranks."""
    rank = int(os.environ["RANK"])
    with process_group(World(rank, rank, options.ranks), torch.device("cpu")) as world:
        model, optimizers = sharded_model(options, world)
        files = {MODEL_FILE: model.state_dict(), OPTIMIZER_FILE: optimizers.tensors()}
        state = TrainerState(step=1, position=Position(), config={}, corpus_sha256="", tokenizer_fingerprint="")
        gathered, parallel = options.folder / "gathered", options.folder / "parallel"
        if world.is_main:
            gathered.mkdir()
        costs: dict[str, list[Cost]] = {"gathered": [], "parallel": []}
        for _ in range(options.rounds):
            costs["gathered"].append(timed(lambda: save_gathered(gathered, files, world), world))
            if world.is_main:
                (gathered / OPTIMIZER_FILE).unlink()  # makes room on a disk in memory
            costs["parallel"].append(timed(lambda: save(parallel, model, optimizers, state, world), world))
            if world.is_main:
                compare(gathered, parallel / "step_00000001")
                shutil.rmtree(parallel)
            world.wait()
        if world.is_main:
            report(model, files, costs, options.ranks)


def save(run: Path, model: Transformer, optimizers: OptimizerSet, state: TrainerState, world: World) -> None:
    """Save a checkpoint as a training run does."""
    save_checkpoint(run, model, None, optimizers.tensors(), state, world=world)


def compare(gathered: Path, checkpoint: Path) -> None:
    """Check that both ways wrote the same weights, bit for bit."""
    from safetensors.torch import load_file

    ours, theirs = read_tensors(checkpoint / MODEL_FILE).tensors, load_file(gathered / MODEL_FILE)
    odd = [name for name in ours.keys() | theirs.keys() if not torch.equal(ours[name], theirs[name])]
    if odd:
        raise SystemExit(f"the two ways wrote different weights: {odd}")


def report(
    model: Transformer, files: Mapping[str, Mapping[str, Tensor]], costs: dict[str, list[Cost]], n_ranks: int
) -> None:
    """Print the figures as a JSON document."""
    n_bytes = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    figures = {
        "parameters": sum(count_parameters(model.config).values()),
        "ranks": n_ranks,
        "cores": os.cpu_count(),
        "bytes": n_bytes,
        "torch": torch.__version__,
    }
    for name, found in costs.items():
        times = [cost.seconds for cost in found]
        median = statistics.median(times)
        figures[name] = {
            "seconds": round(median, 2),
            "lowest": round(min(times), 2),
            "highest": round(max(times), 2),
            "mb_per_s": round(n_bytes / median / 1e6),
            "cpu_s_busiest_rank": round(statistics.median(cost.busiest_cpu_s for cost in found), 2),
            "cpu_s_all_ranks": round(statistics.median(cost.all_cpu_s for cost in found), 2),
        }
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    parsed = parse()
    if "RANK" in os.environ:
        measure(parsed)
    else:
        sys.exit(start(parsed))

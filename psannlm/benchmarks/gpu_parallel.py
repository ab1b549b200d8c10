"""GPU-05 and GPU-06: one process against as many as there are GPUs, by the training engine itself."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from psannlm.benchmarks.gpu_checkpoints import run_config
from psannlm.benchmarks.gpu_report import CheckResult, Measure, at_least, at_most, largest_distance
from psannlm.benchmarks.gpu_stage import Stage
from psannlm.config.run import RunConfig, to_yaml
from psannlm.config.train import TrainConfig
from psannlm.errors import TrainingError
from psannlm.models.artifact import load_model
from psannlm.training.checkpoint import step_folder
from psannlm.training.metrics import read_metrics
from psannlm.training.run import train

_REHEARSAL_RANKS = 2
_TIMEOUT_S = 600.0
_POLL_S = 0.1
LOSS_LIMIT = 1e-4
WEIGHTS_LIMIT = 1e-3
EFFICIENCY_LIMIT = 0.5


def check_ddp(stage: Stage) -> CheckResult:
    """GPU-05: data parallelism."""
    return _check(stage, "GPU-05", "data parallel", {})


def check_fsdp(stage: Stage) -> CheckResult:
    """GPU-06: parameters, gradients and optimiser state shared out over the ranks."""
    title = "fully sharded"
    if "fsdp" not in TrainConfig.model_fields:
        return CheckResult("GPU-06", title, skipped="this version of psannlm has no train.fsdp")
    return _check(stage, "GPU-06", title, {"fsdp": "full"})


def _check(stage: Stage, check: str, title: str, settings: dict[str, Any]) -> CheckResult:
    n_ranks = torch.cuda.device_count() if stage.is_gpu else _REHEARSAL_RANKS
    if n_ranks < 2:
        return CheckResult(check, title, skipped="there is one GPU, and parallel training needs two")
    n_steps = stage.sizes.n_steps
    names = {"one": f"{check}_one", "many": f"{check}_many"}
    stage.say(f"{check}: {n_steps} steps in one process")
    # One process, or the launcher's own variables would make it a rank of something.
    one = run_config(stage, names["one"], grad_accum_steps=n_ranks, ddp="off")
    train(one, resume="never")
    stage.release()
    stage.say(f"{check}: {n_steps} steps on {n_ranks} ranks")
    many = run_config(stage, names["many"], ddp="on", **settings)
    launch(many, stage.folder / f"{check}_ranks", n_ranks, stage.device)
    folders = {name: stage.folder / folder for name, folder in names.items()}
    rows = {name: [row for row in read_metrics(f) if row["kind"] == "train"] for name, f in folders.items()}
    weights = {name: load_model(step_folder(f, n_steps)).model.state_dict() for name, f in folders.items()}
    rates = {name: [float(row["tokens_per_s"]) for row in r] for name, r in rows.items()}
    measures = [
        *parity_measures([r["loss"] for r in rows["one"]], [r["loss"] for r in rows["many"]], weights),
        efficiency_measure(rates["one"], rates["many"], n_ranks, is_rehearsal=stage.is_rehearsal),
    ]
    return CheckResult(
        check,
        title,
        tuple(measures),
        notes=(
            f"{n_ranks} {'GPUs over NCCL' if stage.is_gpu else 'processes over gloo'}; float32; the one process "
            f"accumulates {n_ranks} micro-batches",
        ),
        series={name: [float(row["loss"]) for row in r] for name, r in rows.items()},
    )


def parity_measures(
    one: Sequence[float], many: Sequence[float], weights: Mapping[str, Mapping[str, Tensor]]
) -> list[Measure]:
    """Return how far the losses of every step, and the weights at the end, are apart."""
    distance = largest_distance(one, many)
    first, second = weights["one"], weights["many"]
    squares = sum(float((value.double() - second[name].double()).square().sum()) for name, value in first.items())
    whole = sum(float(value.double().square().sum()) for value in first.values())
    reason = "the same sums of float32 in another order: about 1e-6 a step"
    moved = "AdamW turns a gradient of nearly zero into a step of the learning rate, so weights part faster than losses"
    return [
        at_most("loss, one process against many", distance, LOSS_LIMIT, "nats", reason),
        at_most("weights at the end", (squares / whole) ** 0.5, WEIGHTS_LIMIT, "of their length", moved),
    ]


def efficiency_measure(one: Sequence[float], many: Sequence[float], n_ranks: int, *, is_rehearsal: bool) -> Measure:
    """Return the rate of all ranks beside as many times that of one; the first steps, which warm up, are left out."""
    half = len(one) // 2
    ratio = statistics.median(many[half:]) / (n_ranks * statistics.median(one[half:]))
    limit = 0.0 if is_rehearsal else EFFICIENCY_LIMIT
    reason = "steps of a model this small are short beside the exchange of its gradients; large ones come near to 1"
    if is_rehearsal:
        reason = "a rehearsal holds rates against nothing"
    return at_least("scaling efficiency", ratio, limit, "x", reason, regression=0.15)


def launch(config: RunConfig, folder: Path, n_ranks: int, device: torch.device) -> None:
    """Start the ranks as torchrun would, each with its output in a file of ``folder``, and wait for all of them.

    Raises:
        TrainingError: a rank failed, or all together took more than ten minutes; the others are ended.
    """
    folder.mkdir(parents=True)
    path = folder / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared["LOCAL_WORLD_SIZE"] = str(n_ranks)
    if device.type == "cpu":
        shared["OMP_NUM_THREADS"] = "1"
    logs = [folder / f"rank_{rank}.log" for rank in range(n_ranks)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            with open(log, "wb") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "psannlm", "train", str(path)],
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    )
                )
        _wait(processes, logs)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> None:
    ends_at = time.monotonic() + _TIMEOUT_S
    while any(process.poll() is None for process in processes):
        for rank, process in enumerate(processes):
            if process.poll():
                raise TrainingError(_failure(rank, process.returncode, logs[rank]))
        if time.monotonic() > ends_at:
            raise TrainingError(f"{len(processes)} ranks were not done after {_TIMEOUT_S:.0f} s")
        time.sleep(_POLL_S)
    for rank, process in enumerate(processes):
        if process.returncode:
            raise TrainingError(_failure(rank, process.returncode, logs[rank]))


def _failure(rank: int, code: int, log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"rank {rank} ended with {code}: {lines[-1] if lines else 'it said nothing'}"

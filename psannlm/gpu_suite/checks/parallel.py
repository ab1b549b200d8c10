"""GPU-05 and GPU-06: DDP and FSDP training on all GPUs against a single process: parity and scaling."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from psannlm.config.run import RunConfig, to_yaml
from psannlm.config.train import TrainConfig
from psannlm.errors import TrainingError
from psannlm.gpu_suite.checks.checkpoints import run_config
from psannlm.gpu_suite.checks.speed import fitting_rows
from psannlm.gpu_suite.context import CheckContext
from psannlm.gpu_suite.measures import at_least, at_most, largest_distance
from psannlm.models.artifact import load_model
from psannlm.reports.schemas.gpu import CheckResult, Measure
from psannlm.runtime.launch import private_store, start_rank
from psannlm.training.checkpoint import step_folder
from psannlm.training.metrics import read_metrics
from psannlm.training.run import train

_DRY_RUN_RANKS = 2
_TIMEOUT_S = 600.0
_POLL_S = 0.1
# Logged intervals of a run whose throughput is measured: each synchronizes with the device once.
_ROWS_OF_RATES = 4
LOSS_LIMIT = 1e-4
WEIGHTS_LIMIT = 1e-3
EFFICIENCY_LIMIT = 0.5


def check_ddp(context: CheckContext) -> CheckResult:
    """GPU-05: data parallelism (DDP)."""
    return _check(context, "GPU-05", "data parallel", {})


def check_fsdp(context: CheckContext) -> CheckResult:
    """GPU-06: parameters, gradients and optimizer state sharded over the ranks (FSDP)."""
    title = "fully sharded"
    if "fsdp" not in TrainConfig.model_fields:
        return CheckResult("GPU-06", title, skipped="this version of psannlm has no train.fsdp")
    return _check(context, "GPU-06", title, {"fsdp": "full"})


def _check(context: CheckContext, check: str, title: str, settings: dict[str, Any]) -> CheckResult:
    n_ranks = torch.cuda.device_count() if context.is_gpu else _DRY_RUN_RANKS
    if n_ranks < 2:
        return CheckResult(check, title, skipped="there is one GPU; parallel training needs two")
    n_steps = context.sizes.n_steps
    # The same sums in both runs: the single process accumulates the micro-batches of all ranks.
    pair = _Pair(context, f"{check}_parity", n_ranks)
    rows = pair.train({"grad_accum_steps": n_ranks}, settings)
    losses = {name: [row["loss"] for row in found] for name, found in rows.items()}
    weights = {name: load_model(step_folder(pair.folder(name), n_steps)).model.state_dict() for name in rows}
    scaling, note = _scaling(context, check, n_ranks, settings)
    return CheckResult(
        check,
        title,
        (*parity_measures(losses["one"], losses["many"], weights), *scaling),
        notes=(
            f"{n_ranks} {'GPUs over NCCL' if context.is_gpu else 'processes over gloo'}; parity in float32, where "
            f"the single process accumulates {n_ranks} micro-batches",
            note,
        ),
        series={name: [float(loss) for loss in found] for name, found in losses.items()},
    )


@dataclass(frozen=True)
class _Pair:
    """Two runs of the same training: in one process and on ``n_ranks`` ranks."""

    context: CheckContext
    title: str
    n_ranks: int

    def folder(self, name: str) -> Path:
        return self.context.folder / f"{self.title}_{name}"

    def train(self, of_one: dict[str, Any], of_many: dict[str, Any], **of_both: Any) -> dict[str, list[dict[str, Any]]]:
        """Make both runs and return the logged training rows of each."""
        self.context.say(f"{self.title}: {self.context.sizes.n_steps} steps in one process")
        # ddp off: environment variables of a launcher would make this process a rank.
        train(run_config(self.context, self.folder("one").name, ddp="off", **of_one, **of_both), resume="never")
        self.context.release()
        self.context.say(f"{self.title}: {self.context.sizes.n_steps} steps on {self.n_ranks} ranks")
        many = run_config(self.context, self.folder("many").name, ddp="on", **of_many, **of_both)
        launch(many, self.folder("ranks"), self.n_ranks, self.context.device)
        return {
            name: [row for row in read_metrics(self.folder(name)) if row["kind"] == "train"] for name in ("one", "many")
        }


def _scaling(context: CheckContext, check: str, n_ranks: int, settings: dict[str, Any]) -> tuple[list[Measure], str]:
    """Return the scaling efficiency of a long step, and a note on its size.

    The work per process and the number of optimizer steps are the same in both runs. Few steps are logged, and no
    window is used twice.
    """
    shape = context.sizes.scaling
    free = torch.cuda.mem_get_info(context.device)[0] if context.is_gpu else 1 << 40
    fitting = fitting_rows(shape.config("waveresnet"), shape, context.low_precision(), free)
    if fitting is None:
        return [], f"scaling efficiency is left out: one of its windows does not fit into {free / 1e9:,.1f} GB"
    rows = _Pair(context, f"{check}_scaling", n_ranks).train(
        {},
        settings,
        shape=fitting,
        # A character is a token, and a line takes a few more.
        corpus_bytes=fitting.n_tokens * n_ranks * context.sizes.n_steps,
        amp="auto" if context.is_gpu else "fp32",
        compile=False,
        log_interval_steps=max(1, context.sizes.n_steps // _ROWS_OF_RATES),
    )
    rates = {name: [float(row["tokens_per_s"]) for row in found] for name, found in rows.items()}
    note = (
        f"scaling efficiency of {fitting.n_layers} layers of {fitting.d_model}, {fitting.n_tokens:,} tokens per step "
        "and process, one micro-batch each"
    )
    return [efficiency_measure(rates["one"], rates["many"], n_ranks, is_dry_run=context.is_dry_run)], note


def parity_measures(
    one: Sequence[float], many: Sequence[float], weights: Mapping[str, Mapping[str, Tensor]]
) -> list[Measure]:
    """Return the largest distance of the losses, and the distance of the final weights."""
    distance = largest_distance(one, many)
    first, second = weights["one"], weights["many"]
    squares = sum(float((value.double() - second[name].double()).square().sum()) for name, value in first.items())
    whole = sum(float(value.double().square().sum()) for value in first.values())
    reason = "the same float32 sums in another order: about 1e-6 per step"
    moved = "AdamW makes a full step of a gradient near zero, so weights diverge faster than losses"
    return [
        at_most("loss, one process against many", distance, LOSS_LIMIT, "nats", reason),
        at_most("weights at the end", (squares / whole) ** 0.5, WEIGHTS_LIMIT, "of their length", moved),
    ]


def efficiency_measure(one: Sequence[float], many: Sequence[float], n_ranks: int, *, is_dry_run: bool) -> Measure:
    """Return the throughput of all ranks over ``n_ranks`` times that of one, without the first half (warm-up)."""
    half = len(one) // 2
    ratio = statistics.median(many[half:]) / (n_ranks * statistics.median(one[half:]))
    limit = 0.0 if is_dry_run else EFFICIENCY_LIMIT
    reason = "a step of this size takes several times as long as exchanging its gradients; less is a step that waits"
    if is_dry_run:
        reason = "no throughput limit applies in a dry run"
    return at_least("scaling efficiency", ratio, limit, "x", reason, regression=0.15)


def launch(config: RunConfig, folder: Path, n_ranks: int, device: torch.device) -> None:
    """Start the ranks, each with a log file in ``folder``, and wait for all of them.

    Raises:
        TrainingError: a rank failed, or the ranks took more than ten minutes; the others are killed.
        DeviceError: this machine has no working loopback interface.
    """
    folder.mkdir(parents=True)
    path = folder / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    shared = {"OMP_NUM_THREADS": "1"} if device.type == "cpu" else {}
    logs = [folder / f"rank_{rank}.log" for rank in range(n_ranks)]
    processes: list[subprocess.Popen[bytes]] = []
    with private_store(n_ranks) as place:
        try:
            for rank, log in enumerate(logs):
                with open(log, "wb") as output:
                    processes.append(start_rank(rank, ["train", str(path)], {**place, **shared}, output))
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
            raise TrainingError(f"{len(processes)} ranks did not finish within {_TIMEOUT_S:.0f} s")
        time.sleep(_POLL_S)
    for rank, process in enumerate(processes):
        if process.returncode:
            raise TrainingError(_failure(rank, process.returncode, logs[rank]))


def _failure(rank: int, code: int, log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"rank {rank} ended with exit code {code}: {lines[-1] if lines else 'no output'}"

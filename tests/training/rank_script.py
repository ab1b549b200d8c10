"""Forks ranks, each of which goes through several jobs, a JSON file of a list; prints one JSON line for each.

A job is ``{"config": path, "resume": ..., "defer_readback": ..., "stop": [rank, step]}`` for a run,
``{"fit": texts}`` for ``psannLM.fit`` with a callback, or ``{"count": kind}`` for the number of gradient exchanges in
a step of three micro-batches.
The arguments ``PLACE RANK HOW ARGUMENTS...`` of a rank are the command line with an injected fault.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from psannlm.commands.app import main
from psannlm.config.model import ModelConfig
from psannlm.config.run import load_config
from psannlm.data.loader import MicroBatch
from psannlm.errors import AlreadyReported, Interrupted, StorageError
from psannlm.models.registry import build_model, resolve
from psannlm.runtime.device import Precision
from psannlm.runtime.distributed import World, process_group
from psannlm.training import loop, run, validation
from psannlm.training.optim import OptimizerSet
from psannlm.training.parallel import clip_gradients, replicate, shard
from psannlm.training.step import train_step

LIMIT_S = 300
PLACES = {"forward": (loop, "train_step"), "evaluation": (validation, "evaluate"), "save": (loop, "_save")}


def this_rank() -> int:
    return int(os.environ["RANK"])


def n_ranks() -> int:
    return int(os.environ["WORLD_SIZE"])


def become_ranks() -> list[str]:
    """Fork the ranks that each line of stdin lists, and answer with the exit code and the end of each.

    Return the arguments, in each rank.
    """
    for line in sys.stdin:
        ranks = json.loads(line)
        numbers = {}
        for number, rank in enumerate(ranks):
            pid = os.fork()
            if not pid:
                os.environ.update(rank["environment"])
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                for handle, name in ((1, "out"), (2, "err")):
                    os.dup2(os.open(rank[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), handle)
                return list(rank["arguments"])
            numbers[pid] = number
        ended: list[tuple[int, float]] = [(0, 0.0)] * len(ranks)
        for _ in ranks:
            pid, status = os.wait()
            ended[numbers[pid]] = (os.waitstatus_to_exitcode(status), time.time())
        sys.stdout.write(json.dumps(ended) + "\n")
        sys.stdout.flush()
    sys.exit()


def fail(how: str) -> None:
    sys.stderr.write(f"failing at {time.time()}\n")
    sys.stderr.flush()
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise StorageError("no room") if how == "no room" else ValueError("boom")


def put_fault(place: str, rank: int, how: str) -> None:
    """Let the second call at ``place`` fail on ``rank``."""
    module, name = PLACES[place]
    original, calls = getattr(module, name), []

    def faulty(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 2 and rank == this_rank():
            fail(how)
        return original(*args, **kwargs)

    setattr(module, name, faulty)


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job; as on GPUs where it looks back, and told to stop, on one rank, before a step."""
    with ExitStack() as patches:
        if job.get("defer_readback"):
            patches.enter_context(mock.patch.object(loop.Run, "defer_readback", True))
        if "stop" in job:
            patches.enter_context(mock.patch.object(loop, "train_step", stopping(*job["stop"])))
        try:
            result = run.train(load_config(job["config"]), resume=job.get("resume", "auto"))
        except (Interrupted, AlreadyReported) as error:
            return {"ended": f"{error.exit_code}: {error}"}
    n_whole = sum(not p.is_meta for p in result.model.parameters())
    return {"ended": "done", "steps": result.steps, "whole": n_whole}


def fit(texts: list[str]) -> dict[str, Any]:
    """Fit a model on two micro-batches a step, and return what a callback was told and the weights' sum."""
    from psannlm import Callback, psannLM, psannLMDataPrep

    events: list[list[Any]] = []

    class Recorder(Callback):
        def on_step(self, event: Any) -> None:
            events.append(["step", event.step, event.tokens, event.loss])

        def on_validation(self, event: Any) -> None:
            events.append(["validation", event.step, event.result.n_labels, event.result.loss])

        def on_save(self, event: Any) -> None:
            events.append(["save", event.step, 0, 0.0])

        def on_end(self, result: Any) -> None:
            events.append(["end", result.steps, 0, 0.0])

    data = psannLMDataPrep(texts, tokenizer="simple", max_length=12, val_split=0.2, vocab_size=300)
    model = psannLM(d_model=16, n_layers=1, n_heads=2, vocab_size=data.vocab_size)
    settings: dict[str, Any] = {"amp": "fp32", "device": "cpu", "max_steps": 4, "eval_interval_steps": 2}
    model.fit(data, batch_tokens=24, lr=1e-2, grad_accum_steps=2 // n_ranks(), callbacks=[Recorder()], **settings)
    return {"events": events, "text": model.generate("the", max_new_tokens=8, temperature=0.0)}


def stopping(rank: int, step: int) -> Any:
    """A train_step that gets this process a signal at call ``step`` on ``rank``."""
    calls: list[None] = []

    def stop(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == step and rank == this_rank():
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args, **kwargs)

    return stop


class Exchanges(TorchDispatchMode):
    """Counts what sharded gradients are exchanged with; those of DDP are made in C++, where no mode sees them."""

    n = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += "reduce_scatter" in str(operation)
        return operation(*args, **(kwargs or {}))


def micro_batches() -> list[MicroBatch]:
    ids = torch.randint(0, 17, (3, 2, 9), generator=torch.Generator().manual_seed(this_rank()))
    return [MicroBatch(part[:, :-1], part[:, 1:], 16, None) for part in ids]  # type: ignore[arg-type]


def count(kind: str) -> dict[str, Any]:
    """Exchanges of gradients in one step, once and with every micro-batch; and what a clipped gradient comes to."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    device = torch.device("cpu")
    precision = Precision(device, torch.float32, "test")
    model = build_model(resolve(ModelConfig(base="respsann", d_model=16, n_layers=2, n_heads=2, vocab_size=17)), seed=1)
    found: dict[str, Any] = {}
    with process_group(World(this_rank(), this_rank(), n_ranks()), device) as world:
        exchanged: list[Any] = []

        def hook(state: Any, bucket: Any) -> Any:
            exchanged.append(bucket)
            return allreduce_hook(state, bucket)

        hook.__annotations__.clear()  # torch takes no annotation that is a string
        if kind == "fsdp":
            model = shard(model, world, precision)
            module: Any = model
        else:
            module = replicate(model, world, device)
            module.register_comm_hook(None, hook)
        optimizers = OptimizerSet(model, "adamw", 0.0)
        for sync_once in (True, True, False):
            exchanged.clear()
            with Exchanges() as seen:
                train_step(
                    module,
                    micro_batches(),
                    optimizers,
                    precision=precision,
                    scaler=torch.amp.GradScaler("cpu", enabled=False),
                    lr=0.0,
                    grad_clip=1e-3,
                    sync_once=sync_once,
                    world=world,
                )
            found["once" if sync_once else "each"] = seen.n + len(exchanged)
        # The gradients of the last step were clipped to 0.001 before they were used.
        found["norm"] = float(clip_gradients(model, None))
        del module
    return found


if __name__ == "__main__":
    arguments = become_ranks()
    # Should ranks ever wait for each other without end, the test shall fail with the place they stand at.
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    if len(arguments) > 1:
        put_fault(arguments[0], int(arguments[1]), arguments[2])
        main(arguments[3:])
        sys.exit()
    for job in json.loads(Path(arguments[0]).read_text()):
        if "fit" in job:
            answer = fit(job["fit"])
        else:
            answer = count(job["count"]) if "count" in job else train(job)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()

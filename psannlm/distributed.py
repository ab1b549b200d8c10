"""The process group: who I am among how many, and sums over all of us. One process alone is a world of size 1."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from psannlm.errors import DeviceError


@dataclass(frozen=True)
class World:
    """This process's rank (0 to size - 1), its rank on this machine, and the number of processes."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes files."""
        return self.rank == 0

    def sum(self, value: float, device: torch.device) -> float:
        """Return the sum of ``value`` over all ranks, in float64. Every rank must call it."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return float(total.item())

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether ``flag`` is true on any rank. Every rank must call it."""
        return self.sum(float(flag), device) > 0

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            dist.barrier()


def launched_world(ddp: Literal["auto", "on", "off"]) -> World:
    """Return the world that torchrun describes in the environment, or a world of one.

    Raises:
        DeviceError: ``on`` without torchrun, ``off`` under a torchrun of several processes, or half of an environment.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if ddp == "on" and "RANK" not in os.environ:
        message = "ddp: on needs several processes: torchrun --nproc-per-node N -m psannlm train CONFIG"
        raise DeviceError(f"{message} (or set ddp: auto to train in one process)")
    if ddp == "off" and size > 1:
        raise DeviceError(
            f"ddp: off, but torchrun started {size} processes that would all write one run; use ddp: auto"
        )
    if size == 1 and ddp != "on":
        return World()
    if "RANK" not in os.environ:
        raise DeviceError(f"WORLD_SIZE is {size}, but RANK is not set: start with torchrun, or unset WORLD_SIZE")
    return World(int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0")), size)


@contextmanager
def joined(world: World, device: torch.device) -> Iterator[World]:
    """Hold a process group (nccl on GPUs, gloo on CPUs) for the time of the context; nothing for a world of one."""
    if world.size == 1:
        yield world
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield world
    finally:
        dist.destroy_process_group()

"""The process group: who I am among how many, and sums over all of us. One process alone is a world of size 1."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from itertools import count
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from psannlm.errors import DeviceError, Interrupted
from psannlm.runtime.device import Unread
from psannlm.runtime.folder_store import FolderStore
from psannlm.runtime.watchdog import Lifeline
from psannlm.runtime.watchdog import Store as WatchdogStore

_HOW = "psannlm train --nproc N CONFIG, or torchrun --nproc-per-node N -m psannlm train CONFIG"
# The longest that ranks which live may wait for each other: while rank 0 writes a checkpoint, say.
_PATIENCE = timedelta(minutes=30)
# The longest to wait for a rank that has not come yet: machines do not start at the same time.
_ARRIVAL = timedelta(minutes=5)
# Names the folder where the ranks of one machine meet, which nobody else may enter; torchrun has a port instead.
STORE_FOLDER = "PSANNLM_STORE_FOLDER"
_connections: list[Store] = []
# Groups of one process so far: ranks make and leave them together.
_groups = count()


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
        return value if self.size == 1 else self.send_sum(value, device).read()[0]

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether ``flag`` is true on any rank. Every rank must call it."""
        return self.sum(float(flag), device) > 0

    def total(self, values: Tensor) -> Tensor:
        """Replace ``values`` by their sums over all ranks and return them, on their device and without waiting for it.

        Every rank must call it.
        """
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def send_sum(self, value: float, device: torch.device) -> Unread:
        """Return what :meth:`sum` does, one number, to be read when it is wanted. Every rank must call it.

        A world of one asks no device.
        """
        if self.size == 1:
            device = torch.device("cpu")
        # Not torch.tensor: it copies from memory that a GPU cannot read by itself, and waits for that.
        return Unread(self.total(torch.full((1,), float(value), dtype=torch.float64, device=device)))

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            dist.barrier()


def local_ranks() -> int:
    """Return how many ranks the launcher has started on this machine, 1 where it does not tell."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(text)) if text.isdecimal() else 1


def launched_world(ddp: Literal["auto", "on", "off"], fsdp: Literal["off", "full"] = "off") -> World:
    """Return the world that torchrun describes in the environment, or a world of one.

    Raises:
        DeviceError: ``on`` or ``full`` without torchrun, ``off`` under a torchrun of several processes, or half of an
            environment.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if ddp == "on" and "RANK" not in os.environ:
        raise DeviceError(f"ddp: on needs several processes: {_HOW} (or set ddp: auto to train in one process)")
    if fsdp == "full" and size == 1:
        raise DeviceError(f"fsdp: full shards a model over several processes, and this is one: {_HOW}; or fsdp: off")
    if ddp == "off" and size > 1:
        raise DeviceError(
            f"ddp: off, but torchrun started {size} processes that would all write one run; use ddp: auto"
        )
    if size == 1 and ddp != "on":
        return World()
    meets_at_port = size > 1 and STORE_FOLDER not in os.environ
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if meets_at_port else ("RANK",):
        if name not in os.environ:
            raise DeviceError(f"WORLD_SIZE is {size}, but {name} is not set: start with torchrun, or unset WORLD_SIZE")
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return World(int(os.environ["RANK"]), int(local_rank), size)


@contextmanager
def joined(world: World, device: torch.device) -> Iterator[World]:
    """Hold a process group (nccl on GPUs, gloo on CPUs) for the time of the context; nothing for a world of one.

    An error on one rank ends the context on all of them within half a minute, with that error: see ``lifeline``.

    Raises:
        RankError: another rank failed, or is gone.
    """
    if world.size == 1:
        yield world
        return
    meeting, aside = _stores(world)
    hook = sys.excepthook
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=meeting,
        rank=world.rank,
        world_size=world.size,
        timeout=_PATIENCE,
        device_id=device if device.type == "cuda" else None,
    )
    sys.excepthook = hook  # torch puts one of its own around it, which marks the lines of every rank
    lifeline = Lifeline(aside, world.rank, world.size)
    is_broken = False
    try:
        world.wait()
        lifeline.start()
        yield world
        world.wait()
    except BaseException as error:
        is_broken = not isinstance(error, Interrupted)
        last = lifeline.last_word(error)
        if last is error:
            raise
        raise last from error
    finally:
        lifeline.close()
        if is_broken and device.type == "cuda":
            # nccl would wait for what the others never send.
            dist.group.WORLD.abort()  # type: ignore[union-attr]
        else:
            dist.destroy_process_group()


def leave_group(code: int) -> None:
    """End this process with ``code`` if it was a rank of several; else do nothing.

    Not by way of the interpreter's own end: threads of gloo may still hold Python objects then, and a thread that asks
    for the interpreter while it ends is ended in the middle of C++, which aborts the process. What a rank writes is on
    disk by the time that its command returns.
    """
    if _connections:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _stores(world: World) -> tuple[Store, WatchdogStore]:
    """The store where ranks meet, for torch and for the watchdog, with names that no other group of this job uses."""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"psannlm/{restart}/{next(_groups)}"
    folder = os.environ.get(STORE_FOLDER)
    if folder is not None:
        if not _connections:
            _connections.append(FileStore(os.path.join(folder, "group"), -1))
            _connections[0].set_timeout(_ARRIVAL)
        return PrefixStore(prefix, _connections[0]), FolderStore(Path(folder), prefix)
    if not _connections:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun keeps the store where it can; else rank 0 does, for as long as it lives: were there a new one
        # for every group, a rank in a hurry would enter the old one.
        is_host = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        for hosts in (is_host, False):
            handle = _loopback_listener(*address) if hosts else None
            _connections.append(
                TCPStore(*address, is_master=hosts, wait_for_workers=False, timeout=_ARRIVAL, master_listen_fd=handle)
            )
    meeting, aside = (PrefixStore(prefix, store) for store in _connections)
    return meeting, aside


def _loopback_listener(host: str, port: int) -> int | None:
    """A socket that listens on the loopback address ``host``, for a store; None for an address of another kind.

    By itself a store listens on all interfaces, whatever address it is given.
    """
    try:
        (family, *_, place), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if not ip_address(place[0]).is_loopback:
            return None
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen()
    except OSError as error:
        raise DeviceError(f"MASTER_ADDR {host}, MASTER_PORT {port}: ranks cannot meet there: {error}") from error
    return listener.detach()


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor of which this rank may hold only a part; then every rank must call it."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of ``value``, sharded as ``like`` is; all of it where ``like`` is whole.

    ``value`` must be the same on every rank and on the device of ``like``; nothing is sent.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)

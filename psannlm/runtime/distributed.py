"""Rank, world size, process group and all-reduce helpers. A single process is a world of size 1."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from psannlm.errors import ConfigError, DeviceError, Interrupted
from psannlm.runtime.device import AsyncReadback, pick_device
from psannlm.runtime.folder_store import FolderStore
from psannlm.runtime.launch import STORE_FOLDER
from psannlm.runtime.rank_activity import entering_collective
from psannlm.runtime.watchdog import RankWatchdog
from psannlm.runtime.watchdog import Store as WatchdogStore

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_HOW = "psannlm train --nproc N CONFIG, or torchrun --nproc-per-node N -m psannlm train CONFIG"
# Time limit of a collective between live ranks, such as while rank 0 writes a checkpoint.
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# Time limit for all ranks to join: machines do not start at the same time.
_JOIN_TIMEOUT = timedelta(minutes=5)
_IDENTITY = "identity"
_connections: list[Store] = []
# Number of process groups so far; ranks create and leave them together.
_groups = count()


@dataclass(frozen=True)
class World:
    """This process's rank (0 to size - 1), its rank on this machine, and the number of processes."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes files."""
        return self.rank == 0

    def pick_device(self, name: str) -> torch.device:
        """Return the device of this rank for ``train.device``. Raises DeviceError if there is none."""
        if name == "mps" and self.size > 1:
            raise DeviceError(f"device mps trains in one process, and there are {self.size}; use device: cpu")
        return pick_device(name, self.local_rank, takes_mps=True)

    def sum(self, value: float, device: torch.device) -> float:
        """Return the sum of ``value`` over all ranks, in float64. Every rank must call it."""
        return value if self.size == 1 else self.all_reduce_async(value, device).read()[0]

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether ``flag`` is true on any rank. Every rank must call it."""
        return self.sum(float(flag), device) > 0

    def all_reduce_(self, values: Tensor) -> Tensor:
        """Replace ``values`` by their sums over all ranks, in place, and return them without waiting for the device.

        Every rank must call it.
        """
        if self.size > 1:
            entering_collective()
            dist.all_reduce(values)
        return values

    def all_reduce_async(self, value: float, device: torch.device) -> AsyncReadback:
        """Start a sum of one number over all ranks; return it for a later read. Every rank must call it.

        A world of size 1 uses the CPU only.
        """
        if self.size == 1:
            device = torch.device("cpu")
        # Not torch.tensor: it copies from pageable memory and waits for the copy.
        return AsyncReadback(self.all_reduce_(torch.full((1,), float(value), dtype=torch.float64, device=device)))

    def broadcast_bytes(self, content: bytes, device: torch.device) -> bytes:
        """Return the ``content`` of rank 0, as long as that of the other ranks. Every rank must call it."""
        if self.size == 1:
            return content
        values = torch.tensor(list(content), dtype=torch.uint8, device=device)
        dist.broadcast(values, src=0)
        return bytes(values.tolist())

    def wait(self) -> None:
        """Wait until every rank has called this (barrier)."""
        if self.size > 1:
            entering_collective()
            dist.barrier()


def local_ranks() -> int:
    """Return the number of ranks on this machine as set by the launcher, or 1."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(text)) if text.isdecimal() else 1


def world_from_env(ddp: Literal["auto", "on", "off"], fsdp: Literal["off", "full", "hybrid"] = "off") -> World:
    """Return the world that torchrun describes in the environment, or a world of size 1.

    Raises:
        DeviceError: ``on``, ``full`` or ``hybrid`` without torchrun, ``off`` under torchrun with several processes, or
            an incomplete environment.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if ddp == "on" and "RANK" not in os.environ:
        raise DeviceError(f"ddp: on needs several processes: {_HOW} (or set ddp: auto to train in one process)")
    if fsdp != "off" and size == 1:
        raise DeviceError(f"fsdp: {fsdp} shards a model over several processes, and this is one: {_HOW}; or fsdp: off")
    if ddp == "off" and size > 1:
        raise DeviceError(
            f"ddp: off, but torchrun started {size} processes that would all write one run; use ddp: auto"
        )
    if size == 1 and ddp != "on":
        return World()
    uses_port = size > 1 and STORE_FOLDER not in os.environ
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if uses_port else ("RANK",):
        if name not in os.environ:
            raise DeviceError(f"WORLD_SIZE is {size}, but {name} is not set: start with torchrun, or unset WORLD_SIZE")
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return World(int(os.environ["RANK"]), int(local_rank), size)


@contextmanager
def process_group(world: World, device: torch.device, identity: Mapping[str, Any] | None = None) -> Iterator[World]:
    """Create a process group (nccl on GPUs, gloo on CPUs) for the context; nothing for a world of size 1.

    An error on one rank ends the context on all ranks within half a minute, with that error: see ``watchdog``.

    Args:
        identity: what must be equal on all ranks, such as the configuration, as plain data by name.

    Raises:
        ConfigError: ``identity`` is another one than that of rank 0; the message lists what differs.
        RankError: another rank failed or died.
    """
    if world.size == 1:
        yield world
        return
    group_store, watchdog_store = _stores(world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    watchdog = RankWatchdog(watchdog_store, world.rank, world.size)
    is_broken = is_done = False
    try:
        watchdog.start()
        _refuse_other_identity(group_store, world, identity or {})
        _init_group(group_store, world, device)
        world.wait()
        watchdog.join()
        yield world
        world.wait()
        is_done = True
    except BaseException as error:  # whatever ends this rank, Ctrl-C included, ends the others; it is raised again
        is_broken = not isinstance(error, Interrupted)
        last = watchdog.resolve_error(error)
        if last is error:
            raise
        raise last from error
    finally:
        watchdog.close(is_done=is_done)
        if is_broken and device.type == "cuda" and dist.is_initialized():
            # Destroying the group would wait for messages that the other ranks never send.
            dist.group.WORLD.abort()  # type: ignore[union-attr]
        elif dist.is_initialized():
            dist.destroy_process_group()


def _init_group(store: Store, world: World, device: torch.device) -> None:
    hook = sys.excepthook
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=_COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    sys.excepthook = hook  # torch wraps it in its own, which prefixes the lines of every rank


def _refuse_other_identity(store: Store, world: World, identity: Mapping[str, Any]) -> None:
    """Raise ConfigError if ``identity`` differs from that of rank 0, which must be joining too."""
    if world.is_main:
        store.set(_IDENTITY, json.dumps(identity))
        return
    first: dict[str, Any] = json.loads(store.get(_IDENTITY))
    changed = [key for key in {**first, **identity} if first.get(key) != identity.get(key)]
    if changed:
        values = "; ".join(f"{key} is {identity.get(key)!r} here and {first.get(key)!r} there" for key in changed[:3])
        more = f"; and {len(changed) - 3} more" if changed[3:] else ""
        raise ConfigError(
            f"differs from rank 0: {values:.600}{more}. Start every rank with the same version of the code and the "
            "same configuration"
        )


def leave_group(code: int) -> None:
    """Exit with ``code`` if this process was one of several ranks; else do nothing.

    The normal exit of the interpreter is skipped: threads of gloo may still hold Python objects, and a thread that
    requests the GIL during finalization is killed inside C++, which aborts the process. All files of a rank are written
    before its command returns.
    """
    if _connections:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _stores(world: World) -> tuple[Store, WatchdogStore]:
    """Return two key-value stores, for torch and for the watchdog, with a prefix unique to this process group."""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"psannlm/{restart}/{next(_groups)}"
    folder = os.environ.get(STORE_FOLDER)
    if folder is not None:
        if not _connections:
            _connections.append(FileStore(os.path.join(folder, "group"), -1))
            _connections[0].set_timeout(_JOIN_TIMEOUT)
        return PrefixStore(prefix, _connections[0]), FolderStore(Path(folder), prefix)
    if not _connections:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun hosts the store if it can; otherwise rank 0 does, for the life of its process: with a new store for
        # every group, a fast rank could join the old one.
        is_host = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        for hosts in (is_host, False):
            handle = _loopback_listener(*address) if hosts else None
            _connections.append(
                TCPStore(
                    *address, is_master=hosts, wait_for_workers=False, timeout=_JOIN_TIMEOUT, master_listen_fd=handle
                )
            )
    group_store, watchdog_store = (PrefixStore(prefix, store) for store in _connections)
    return group_store, watchdog_store


def _loopback_listener(host: str, port: int) -> int | None:
    """Return a socket that listens on the loopback address ``host``; None for any other address.

    A TCPStore without such a socket listens on all interfaces, whatever its address.
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
        raise DeviceError(f"MASTER_ADDR {host}, MASTER_PORT {port}: ranks cannot connect there: {error}") from error
    return listener.detach()


def gather_bytes(content: bytes, device: torch.device) -> list[bytes]:
    """Return the ``content`` of every rank, in their order. Every rank of the group must call it.

    It travels as tensors on ``device``: torch's collectives of objects would send pickles.
    """
    size = torch.tensor([len(content)], device=device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    lengths = [int(each) for each in sizes]
    own = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    own[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
    found = [torch.empty_like(own) for _ in lengths]
    dist.all_gather(found, own)
    return [bytes(each[:length].tolist()) for each, length in zip(found, lengths, strict=True)]


def as_sharded(tensor: Tensor) -> DTensor | None:
    """Return ``tensor`` if it is a shard of a larger one, else None.

    The module of such tensors, which takes half as long to import as torch, is only loaded by what shards a model.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a sharded ``tensor``; then every rank must call it."""
    sharded = as_sharded(tensor)
    return tensor if sharded is None else sharded.full_tensor()


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of ``value``, sharded as ``like`` is; ``value`` itself if ``like`` is not sharded.

    ``value`` must be the same on every rank and on the device of ``like``. Nothing is communicated.
    """
    sharded = as_sharded(like)
    if sharded is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)

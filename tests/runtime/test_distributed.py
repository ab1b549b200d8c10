"""World and process group from the environment of torchrun; a single process is a world of size 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from psannlm.errors import DeviceError
from psannlm.runtime.distributed import World, process_group, world_from_env

CPU = torch.device("cpu")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a setter of the environment that a launcher leaves."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def set_environment(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_environment


@pytest.mark.parametrize("ddp", ["auto", "off"])
def test_world_without_launcher_has_size_one(launched: Any, ddp: Any) -> None:
    world = world_from_env(ddp)
    assert world == World(0, 0, 1)
    assert world.is_main
    with process_group(world, CPU):
        assert not dist.is_initialized()
        assert world.sum(2.5, CPU) == 2.5
        assert world.any(True, CPU)
        assert not world.any(False, CPU)
        world.wait()


def test_world_from_env_reads_launcher_variables(launched: Any) -> None:
    launched(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    for ddp in ("auto", "on"):
        world = world_from_env(ddp)
        assert world == World(5, 1, 8)
        assert not world.is_main


def test_ddp_on_without_launcher_raises(launched: Any) -> None:
    with pytest.raises(DeviceError, match="torchrun --nproc-per-node N") as caught:
        world_from_env("on")
    assert "ddp: auto" in str(caught.value)


def test_ddp_on_with_one_process_works(launched: Any) -> None:
    launched(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    assert world_from_env("on") == World(0, 0, 1)


def test_ddp_off_with_several_processes_raises(launched: Any) -> None:
    """They would all write one run folder."""
    launched(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    with pytest.raises(DeviceError, match="torchrun started 2 processes"):
        world_from_env("off")


def test_world_from_incomplete_env_raises(launched: Any) -> None:
    """Some clusters set WORLD_SIZE in every container."""
    launched(WORLD_SIZE="2")
    with pytest.raises(DeviceError, match="WORLD_SIZE is 2, but RANK is not set"):
        world_from_env("auto")


def test_world_without_master_address_raises(launched: Any) -> None:
    launched(WORLD_SIZE="2", RANK="1")
    with pytest.raises(DeviceError, match="MASTER_ADDR is not set"):
        world_from_env("auto")


def test_fsdp_with_one_process_raises(launched: Any) -> None:
    with pytest.raises(DeviceError, match="psannlm train --nproc N"):
        world_from_env("auto", "full")
    launched(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    with pytest.raises(DeviceError, match="or fsdp: off"):
        world_from_env("on", "full")


@pytest.fixture
def _group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of one that may believe to be larger."""
    original = dist.init_process_group
    store = dist.HashStore()
    store.set("alive/1", "1")

    def init(backend: str, **place: Any) -> None:
        original(backend, **{**place, "world_size": 1})

    monkeypatch.setattr("psannlm.runtime.watchdog._GRACE_S", 0.0)
    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr("psannlm.runtime.distributed._stores", lambda world: (dist.HashStore(), store))


@pytest.mark.usefixtures("_group_of_one")
def test_process_group_sums_over_ranks() -> None:
    """What goes out is what the collective gives back, in float64."""
    world = World(0, 0, 2)
    with process_group(world, CPU):
        assert dist.get_backend() == "gloo"
        assert world.sum(0.1 + 0.2, CPU) == 0.1 + 0.2
        assert world.any(True, CPU)
        assert not world.any(False, CPU)
        sent = world.all_reduce_async(2.5, CPU)
        assert world.all_reduce_(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
        assert sent.read() == [2.5]
        world.wait()
    assert not dist.is_initialized()


def test_world_of_one_uses_no_device() -> None:
    """On one that holds no numbers there would be none to read."""
    assert World().all_reduce_async(2.5, torch.device("meta")).read() == [2.5]
    assert World().any(True, torch.device("meta"))


@pytest.mark.usefixtures("_group_of_one")
def test_process_group_is_destroyed_after_error() -> None:
    with pytest.raises(ValueError, match="within"), process_group(World(0, 0, 2), CPU):
        raise ValueError("within")
    assert not dist.is_initialized()

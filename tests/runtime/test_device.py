"""Device and precision: the requested one or an error; automatic choices have a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from psannlm.errors import DeviceError
from psannlm.kernels.compiler import require_compiler
from psannlm.runtime import device
from psannlm.runtime.device import describe_device, pick_device, pick_precision, sum_dtype
from psannlm.runtime.distributed import World

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a setter of how many GPUs torch sees."""

    def see(count: int) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)

    return see


@pytest.mark.parametrize(
    "name", ["gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cuda:1:2", "cpu:0", "auto:1", "", "mps:0"]
)
def test_pick_device_unknown_name_raises(gpus: Any, name: str) -> None:
    gpus(2)
    with pytest.raises(DeviceError, match="not one of auto, cpu, cuda, cuda:N") as caught:
        pick_device(name)
    assert f"'{name}'" in str(caught.value)


def test_mps_states_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an Apple processor: what is refused there is refused before anything is computed."""
    cannot = "mps trains and validates only, in float32 and one process, without compilation"
    with pytest.raises(DeviceError, match=cannot):
        pick_device("mps")  # to generate, serve or benchmark
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(DeviceError, match="finds no Apple GPU; use device: cpu"):
        pick_device("mps", takes_mps=True)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    mps = World().pick_device("mps")
    assert mps == torch.device("mps")
    with pytest.raises(DeviceError, match="trains in one process, and there are 2"):
        World(size=2).pick_device("mps")
    assert pick_precision("auto", mps).dtype == pick_precision("fp32", mps).dtype == torch.float32
    assert cannot in pick_precision("auto", mps).reason
    for amp in ("bf16", "fp16"):
        with pytest.raises(DeviceError, match=f"amp: {amp} with device mps: .*; use amp: fp32"):
            pick_precision(amp, mps)
    with pytest.raises(DeviceError, match=r"compile: true with device mps: .*; set compile: false"):
        require_compiler(mps)
    assert sum_dtype(mps) == torch.float32, "it has no float64"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert pick_device("auto", takes_mps=True) == CPU, "it is taken only by its name"


def test_pick_device_suggests_nearest_name() -> None:
    with pytest.raises(DeviceError, match=r"did you mean 'cuda'\?"):
        pick_device("cud")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:3"])
def test_pick_device_missing_gpu_raises(gpus: Any, name: str) -> None:
    gpus(0)
    with pytest.raises(DeviceError, match="finds no GPU; use device: cpu"):
        pick_device(name)


def test_pick_device_auto_takes_available_device(gpus: Any) -> None:
    gpus(0)
    assert pick_device("auto") == CPU
    assert pick_device("auto", local_rank=3) == CPU
    gpus(2)
    assert pick_device("auto") == torch.device("cuda", 0)
    assert pick_device("auto", local_rank=1) == torch.device("cuda", 1)
    assert pick_device("cuda", local_rank=1) == torch.device("cuda", 1)
    assert pick_device("cpu", local_rank=1) == CPU
    assert pick_device("cuda:1", local_rank=0) == torch.device("cuda", 1)


@pytest.mark.parametrize(("name", "local_rank"), [("cuda:2", 0), ("cuda", 2), ("auto", 2)])
def test_pick_device_gpu_index_out_of_range_raises(gpus: Any, name: str, local_rank: int) -> None:
    gpus(2)
    with pytest.raises(DeviceError, match="GPU 2 was requested, but there are 2"):
        pick_device(name, local_rank)


@pytest.mark.parametrize(
    ("amp", "has_bf16", "dtype"),
    [
        ("fp32", True, torch.float32),
        ("fp32", False, torch.float32),
        ("fp16", False, torch.float16),
        ("bf16", True, torch.bfloat16),
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
    ],
)
def test_pick_precision_takes_requested_or_best_supported(
    monkeypatch: pytest.MonkeyPatch, amp: Any, has_bf16: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(device, "computes_in_bf16", lambda _: has_bf16)
    precision = pick_precision(amp, CPU)
    assert precision.dtype == dtype
    assert precision.needs_scaler == (dtype == torch.float16)
    assert precision.reason.startswith({torch.float32: "fp32", torch.float16: "fp16"}.get(dtype, "bf16"))
    with precision.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == dtype


def test_pick_precision_bf16_works_without_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "computes_in_bf16", lambda _: False)
    precision = pick_precision("bf16", CPU)
    assert precision.dtype == torch.bfloat16
    assert "in software" in precision.reason
    assert "amp: auto or fp32 is faster" in precision.reason
    with precision.autocast():
        assert (torch.ones(2, 3) @ torch.ones(3, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, False),
        ({"avx2": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"bf16": True}, True),
    ],
)
def test_computes_in_bf16_reads_cpu_capabilities(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: bool
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities, raising=False)
    assert device.computes_in_bf16(CPU) is expected


def test_describe_device_names_cpu_threads() -> None:
    assert describe_device(CPU).startswith(f"CPU, {torch.get_num_threads()} thread")

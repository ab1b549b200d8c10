"""Device, precision and memory of this machine."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from psannlm.errors import DeviceError, nearest
from psannlm.runtime.resident_memory import peak_resident_bytes, resident_bytes

if TYPE_CHECKING:
    from psannlm.config.train import Amp

MPS_CANNOT = (
    "mps trains and validates only, in float32 and one process, without compilation, samples and task scores, and was "
    "never measured"
)


def pick_device(name: str = "auto", local_rank: int = 0, *, takes_mps: bool = False) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; auto and cuda take the GPU of ``local_rank``.

    ``mps``, the GPU of an Apple processor, is taken only by its name, and only where the caller ``takes_mps``.

    Raises:
        DeviceError: the name is unknown, or the GPU does not exist or cannot do what the caller does.
    """
    if name == "mps":
        return _pick_mps(takes_mps)
    kind, colon, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (colon and not (kind == "cuda" and index.isdecimal())):
        raise DeviceError(
            f"device '{name}' is not one of auto, cpu, cuda, cuda:N{nearest(name, ('auto', 'cpu', 'cuda'))}"
        )
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    wanted = int(index) if index else local_rank
    if not torch.cuda.is_available():
        raise DeviceError(f"device {name} was requested, but torch {torch.__version__} finds no GPU; use device: cpu")
    if wanted >= torch.cuda.device_count():
        raise DeviceError(f"GPU {wanted} was requested, but there are {torch.cuda.device_count()}, counted from 0")
    return torch.device("cuda", wanted)


def _pick_mps(is_taken: bool) -> torch.device:
    if not is_taken:
        raise DeviceError(f"device mps: {MPS_CANNOT}; use device: cpu here")
    if not torch.backends.mps.is_available():
        raise DeviceError(
            f"device mps was requested, but torch {torch.__version__} finds no Apple GPU; use device: cpu"
        )
    return torch.device("mps")


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums over a step: float64, which mps lacks, or float32 (exact to 16 million tokens)."""
    return torch.float32 if device.type == "mps" else torch.float64


def gpu_memory_bytes(device: torch.device) -> int | None:
    """Return the memory of a GPU in bytes, or None for a CPU."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the peak memory in bytes: allocated by torch on a GPU, else the resident memory of the process.

    None where the system does not report it.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident_bytes()


def computes_in_bf16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 in hardware, not in a slower emulation."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


@dataclass(frozen=True)
class Precision:
    """Arithmetic of matrix products: the autocast ``dtype``, and the reason for it."""

    device: torch.device
    dtype: torch.dtype
    reason: str

    @property
    def needs_scaler(self) -> bool:
        """Whether gradients must be scaled to stay within the range of the dtype."""
        return self.dtype == torch.float16

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context to run a forward pass in."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def pick_precision(amp: Amp, device: torch.device) -> Precision:
    """Return the precision for ``amp`` on ``device``; ``auto`` is bf16 with hardware support, else fp32.

    An explicit bf16 is always bf16: without hardware support, torch computes the same arithmetic in software.

    Raises:
        DeviceError: bf16 or fp16 on mps.
    """
    if device.type == "mps":
        if amp not in ("auto", "fp32"):
            raise DeviceError(f"amp: {amp} with device mps: {MPS_CANNOT}; use amp: fp32")
        return Precision(device, torch.float32, f"fp32; {MPS_CANNOT}")
    if amp == "fp32":
        return Precision(device, torch.float32, "fp32 as asked")
    if amp == "fp16":
        return Precision(device, torch.float16, "fp16 as asked")
    has_bf16 = computes_in_bf16(device)
    if amp == "bf16":
        in_software = f", in software: this {device.type} has no bf16 hardware, and amp: auto or fp32 is faster"
        return Precision(device, torch.bfloat16, f"bf16 as asked{'' if has_bf16 else in_software}")
    if has_bf16:
        return Precision(device, torch.bfloat16, f"bf16: this {device.type} computes in it")
    return Precision(device, torch.float32, f"fp32: this {device.type} has no bf16 hardware")


class AsyncReadback:
    """Asynchronous copy of numbers from a device: construction does not wait, :meth:`read` does.

    The copy starts at construction, so that reading waits for the work that computes the numbers, not for later work.
    """

    def __init__(self, numbers: Tensor) -> None:
        """Start the copy of ``numbers``, a vector that must not change afterwards."""
        # From a GPU: a copy to pinned memory. From mps, a copy that is not waited for may hold anything.
        self._numbers = numbers.to("cpu", non_blocking=numbers.is_cuda)
        self._arrival: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            with torch.cuda.device(numbers.device):
                self._arrival.record()

    def read(self) -> list[float]:
        """Return the numbers."""
        if self._arrival is not None:
            self._arrival.synchronize()
        numbers: list[float] = self._numbers.tolist()
        return numbers


@dataclass(frozen=True)
class MemoryUse:
    """Current and peak memory of this process in bytes; ``kind`` is ``memory`` or ``GPU memory``."""

    kind: str
    now_bytes: int
    most_bytes: int


def memory_in_use() -> MemoryUse | None:
    """Return the tensor memory of the GPU in use, else the resident memory; None if the system does not report it."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return MemoryUse("GPU memory", torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())
    resident = resident_bytes()
    return None if resident is None else MemoryUse("memory", *resident)


def describe_device(device: torch.device) -> str:
    """Return the name of the GPU, or the number of CPU threads, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "GPU of an Apple processor (mps)"
    n_threads = torch.get_num_threads()
    return f"CPU, {n_threads} thread{'' if n_threads == 1 else 's'}"

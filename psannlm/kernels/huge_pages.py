"""Memory in huge pages, for what a decoding step reads wholly: weights, and the KV cache.

A processor looks an address up in a table of pages, and a step through 100 MB meets 27,000 of the usual 4 KB.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

# Of x86-64, and of arm64 with pages of 4 KB. A smaller tensor has no huge page.
HUGE_PAGE_BYTES = 2 << 20
# Of vectors, which torch's kernels and compiled code load.
_ALIGNMENT = 64


class HugePages:
    """One stretch of zeros in huge pages, handed out in parts; it lives as long as a part of it does.

    Where the system has no huge pages, or ``n_bytes`` fill none, it is usual memory.
    """

    def __init__(self, n_bytes: int) -> None:
        self._at = 0
        self._bytes = _map_huge_pages(n_bytes) if n_bytes >= HUGE_PAGE_BYTES else None
        if self._bytes is None:
            self._bytes = torch.zeros(n_bytes, dtype=torch.uint8)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the next part as a tensor of zeros on the CPU. Raises ValueError where too few bytes are left."""
        assert self._bytes is not None
        n_bytes = math.prod(shape) * dtype.itemsize
        if self._at + n_bytes > len(self._bytes):
            raise ValueError(f"{n_bytes:,} bytes are more than the {len(self._bytes) - self._at:,} that are left")
        part = self._bytes[self._at : self._at + n_bytes]
        self._at = min(self._at + aligned_bytes(n_bytes), len(self._bytes))
        return part.view(dtype).view(*shape)


def aligned_bytes(n_bytes: int) -> int:
    """Return the bytes that a part of ``n_bytes`` takes."""
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


def _map_huge_pages(n_bytes: int) -> Tensor | None:
    """Return zeros (n_bytes,) uint8 that begin with a huge page, or None where the system has none."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return None
    mapped = mmap.mmap(-1, n_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        mapped.madvise(advice)
    except OSError:  # a kernel without transparent huge pages
        return None
    # The tensor holds the mapping.
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE_PAGE_BYTES
    return whole[begin : begin + n_bytes]

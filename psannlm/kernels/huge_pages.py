"""Memory in huge pages, for weights, each of which a decoding step reads.

A processor looks an address up in a table of pages, and matrices of 100 MB lie on 24,400 of the usual 4 KB.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

# Of x86-64, and of arm64 with pages of 4 KB.
HUGE_PAGE_BYTES = 2 << 20
# Of vectors, which torch's kernels and compiled code load.
_ALIGNMENT = 64


def zeros_in_huge_pages(shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> list[Tensor] | None:
    """Return tensors of zeros on the CPU, side by side in one allocation that lives as long as one of them.

    Returns:
        None where they fill no huge page, or the system has none (it is not Linux, or its kernel lacks them).
    """
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    memory = _map_huge_pages(sum(map(_aligned, sizes)))
    if memory is None:
        return None
    tensors, at = [], 0
    for size, shape, dtype in zip(sizes, shapes, dtypes, strict=True):
        tensors.append(memory[at : at + size].view(dtype).view(*shape))
        at += _aligned(size)
    return tensors


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


def _map_huge_pages(n_bytes: int) -> Tensor | None:
    """Return zeros (n_bytes,) uint8 that begin with a huge page, or None."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or n_bytes < HUGE_PAGE_BYTES:
        return None
    mapped = mmap.mmap(-1, n_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # The tensor holds the mapping.
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE_PAGE_BYTES
    # A last page that would be less than half full stays in usual pages.
    n_advised = round(n_bytes / HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    try:
        mapped.madvise(advice, begin, min(n_advised, len(whole) - begin))
    except OSError:  # a kernel without transparent huge pages
        return None
    return whole[begin : begin + n_bytes]

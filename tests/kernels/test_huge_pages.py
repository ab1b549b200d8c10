"""Memory in huge pages: parts are apart, aligned, zero at first, and outlive what handed them out."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

import pytest
import torch

from psannlm.kernels.huge_pages import HUGE_PAGE_BYTES, HugePages, aligned_bytes

SHAPES = [((3, 7), torch.int8), ((511, 1025), torch.float32), ((2, 3, 5), torch.bfloat16), ((1 << 20,), torch.int8)]


def total_bytes() -> int:
    return sum(aligned_bytes(torch.empty(shape, dtype=dtype).nbytes) for shape, dtype in SHAPES)


def test_parts_are_apart_and_outlive_their_pages() -> None:
    pages = HugePages(total_bytes())
    parts = [pages.zeros(shape, dtype) for shape, dtype in SHAPES]
    for number, part in enumerate(parts, start=1):
        assert part.count_nonzero() == 0
        part.fill_(number)
    del pages
    gc.collect()
    for number, (part, (shape, dtype)) in enumerate(zip(parts, SHAPES, strict=True), start=1):
        assert (part.shape, part.dtype, part.data_ptr() % 64) == (shape, dtype, 0)
        assert torch.equal(part, torch.full(shape, number, dtype=dtype))


@pytest.mark.parametrize("n_bytes", [100, 2 * HUGE_PAGE_BYTES])
def test_more_than_its_bytes_is_refused(n_bytes: int) -> None:
    pages = HugePages(n_bytes)
    pages.zeros((n_bytes - 36,), torch.int8)
    with pytest.raises(ValueError, match=r"37 bytes are more than the \d+ that are left"):
        pages.zeros((37,), torch.int8)


def test_system_without_huge_pages_gives_usual_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    part = HugePages(2 * HUGE_PAGE_BYTES).zeros((HUGE_PAGE_BYTES,), torch.int16)
    assert part.count_nonzero() == 0


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages")
def test_written_pages_are_huge_where_system_grants_them() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system grants no huge pages")
    part = HugePages(8 * HUGE_PAGE_BYTES).zeros((8 * HUGE_PAGE_BYTES,), torch.uint8).fill_(1)
    assert part.data_ptr() % HUGE_PAGE_BYTES == 0
    assert "hg" in vm_flags(part.data_ptr())


def vm_flags(address: int) -> list[str]:
    """The kernel's flags of the mapping with ``address``; hg: it was advised to use huge pages."""
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = line.split()[0].split("-")
        if len(bounds) == 2 and not line.startswith(("VmFlags", "Rss")):
            is_inside = int(bounds[0], 16) <= address < int(bounds[1], 16)
        elif is_inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []

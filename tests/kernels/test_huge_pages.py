"""Memory in huge pages: tensors are apart, aligned, zero at first, and outlive each other."""

from __future__ import annotations

import gc
import mmap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from psannlm.generation.engine import Engine
from psannlm.generation.quantize import InferenceLinear
from psannlm.kernels.huge_pages import HUGE_PAGE_BYTES, zeros_in_huge_pages
from psannlm.models.transformer import Transformer

SHAPES = [(3, 7), (511, 1025), (2, 3, 5), (1 << 20,)]
DTYPES = [torch.int8, torch.float32, torch.bfloat16, torch.int8]
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
has_huge_pages = pytest.mark.skipif(not SETTING.exists(), reason="this system has no huge pages")


def is_advised(tensor: Tensor) -> bool:
    """Whether the kernel was advised to use huge pages where ``tensor`` begins (flag hg)."""
    address, is_inside = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        bounds = first.split("-")
        if len(bounds) == 2 and ":" not in first:
            is_inside = int(bounds[0], 16) <= address < int(bounds[1], 16)
        elif is_inside and first == "VmFlags:":
            return "hg" in rest
    return False


@has_huge_pages
def test_huge_pages_tensors_are_apart_and_outlive_each_other() -> None:
    tensors = zeros_in_huge_pages(SHAPES, DTYPES)
    assert tensors is not None
    assert tensors[0].data_ptr() % HUGE_PAGE_BYTES == 0
    for number, tensor in enumerate(tensors, start=1):
        assert tensor.count_nonzero() == 0
        tensor.fill_(number)
    for number, (tensor, shape, dtype) in enumerate(zip(tensors, SHAPES, DTYPES, strict=True), start=1):
        assert (tensor.shape, tensor.dtype, tensor.data_ptr() % 64) == (shape, dtype, 0)
        assert torch.equal(tensor, torch.full(shape, number, dtype=dtype))
    last = tensors[-1]
    del tensors, tensor
    gc.collect()
    assert torch.equal(last, torch.full(SHAPES[-1], len(SHAPES), dtype=torch.int8))


@has_huge_pages
@pytest.mark.parametrize(("n_bytes", "n_advised"), [(2 * HUGE_PAGE_BYTES + 64, 2), (2 * HUGE_PAGE_BYTES - 64, 2)])
def test_huge_pages_leave_nearly_empty_end_out(n_bytes: int, n_advised: int) -> None:
    tensors = zeros_in_huge_pages([(n_bytes,)], [torch.int8])
    assert tensors is not None
    assert is_advised(tensors[0])
    assert is_advised(tensors[0][(n_advised - 1) * HUGE_PAGE_BYTES :])
    if n_bytes > n_advised * HUGE_PAGE_BYTES:
        assert not is_advised(tensors[0][n_advised * HUGE_PAGE_BYTES :])


def test_huge_pages_are_refused_where_none_would_be_full(monkeypatch: pytest.MonkeyPatch) -> None:
    assert zeros_in_huge_pages([(HUGE_PAGE_BYTES - 64,)], [torch.int8]) is None
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert zeros_in_huge_pages([(4 * HUGE_PAGE_BYTES,)], [torch.int8]) is None


@has_huge_pages
@pytest.mark.parametrize("in_place", [False, True])
def test_engine_has_matrices_in_huge_pages(
    in_place: bool, build_tiny: Callable[..., Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"base": "transformer", "d_model": 256, "d_mlp": 1024, "n_heads": 4, "vocab_size": 1024}
    prompts = [[5, 900, 3], [77] * 40]
    logits = []
    for hides_huge_pages in (False, True):
        if hides_huge_pages:
            monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
        engine = Engine(build_tiny(**settings), dtype="int8", in_place=in_place)
        linears = [module for module in engine.model.modules() if isinstance(module, InferenceLinear)]
        # The last of them may lie in the rest that fills no huge page.
        assert [is_advised(linear.weight) for linear in linears[:4]] == [not hides_huge_pages] * 4
        logits.append(engine.prefill(prompts, 4)[0])
    assert torch.equal(*logits)

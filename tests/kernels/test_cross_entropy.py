"""Chunked cross-entropy against torch's on full logits, gradients included, without full logits in memory."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from psannlm.config.constants import IGNORE_INDEX
from psannlm.kernels import cross_entropy as loss_module
from psannlm.kernels.compiler import has_compiler
from psannlm.kernels.cross_entropy import linear_cross_entropy

D, V = 6, 11
SMALLEST_CHUNK = 64


def case(n_tokens: int, ignored: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n_tokens, D, generator=generator), torch.randn(V, D, generator=generator)
    labels = torch.randint(0, V, (n_tokens,), generator=generator)
    labels[torch.rand(n_tokens, generator=generator) < ignored] = IGNORE_INDEX
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float) -> list[Tensor]:
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    total = F.cross_entropy(
        hidden @ weight.t(), labels, ignore_index=IGNORE_INDEX, label_smoothing=smoothing, reduction="sum"
    )
    return [total.detach(), *torch.autograd.grad(total, (hidden, weight))]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("n_tokens", [0, 1, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_cross_entropy_matches_full_logits(
    smoothing: float, n_tokens: int, ignored: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", 1)
    hidden, weight, labels = case(n_tokens, ignored)
    total = linear_cross_entropy(hidden, weight, labels, smoothing)
    found = [total.detach(), *torch.autograd.grad(total, (hidden, weight))]
    for ours, exact in zip(found, reference(hidden, weight, labels, smoothing), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    if ignored == 1.0:
        assert not any(t.any() for t in found)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_cross_entropy_compilable_formula_matches_in_place(
    smoothing: float, dtype: torch.dtype, wants_gradient: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (30 * torch.randn(50, V, generator=generator)).to(dtype)
    labels = torch.randint(0, V, (50,), generator=generator)
    labels[::7] = IGNORE_INDEX
    compilable = loss_module._chunk_loss_compilable(logits, labels, smoothing, wants_gradient)
    in_place = loss_module._chunk_loss_in_place(logits.clone(), labels, smoothing, wants_gradient)
    torch.testing.assert_close(compilable, in_place, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_cross_entropy_compiles_inside_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rehearsed on a CPU: chunks of two lengths, with gradients and without, after a break of the model's graph."""
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", 1)
    hidden, weight, labels = case(SMALLEST_CHUNK + 20)

    @torch.compile
    def model(x: Tensor) -> Tensor:
        return linear_cross_entropy(x * 2.0, weight, labels, 0.1)

    plain = torch.autograd.grad(linear_cross_entropy(hidden * 2.0, weight, labels, 0.1), (hidden, weight))
    monkeypatch.setattr(loss_module, "use_compiled_kernels", lambda x: True)
    before = counters["stats"]["unique_graphs"]
    total = model(hidden)
    fused = torch.autograd.grad(total, (hidden, weight))
    with torch.no_grad():
        assert model(hidden).item() == pytest.approx(total.item(), rel=1e-6)
    assert counters["stats"]["unique_graphs"] >= before + 3, "the model's own graphs, and the loss with its gradient"
    for ours, exact in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def test_cross_entropy_gradient_scales_with_upstream() -> None:
    hidden, weight, labels = case(70)
    _, by_hidden, by_weight = reference(hidden, weight, labels, 0.1)
    (linear_cross_entropy(hidden, weight, labels, 0.1) * 0.25).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(hidden.grad.double(), by_hidden * 0.25, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), by_weight * 0.25, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_cross_entropy_skips_gradients_of_frozen_tensors(frozen: str) -> None:
    hidden, weight, labels = case(70)
    total, by_hidden, by_weight = reference(hidden, weight, labels, 0.0)
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    found = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(found.detach().double(), total, rtol=1e-5, atol=1e-5)
    for leaf, exact in ((hidden, by_hidden), (weight, by_weight)):
        if leaf.requires_grad:
            (gradient,) = torch.autograd.grad(found, leaf)
            torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-5)
    assert found.requires_grad == (frozen != "both")


class Shapes(TorchDispatchMode):
    """Records the shapes of all tensors that an operation allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {arg.data_ptr() for arg in args if isinstance(arg, Tensor)}
        made = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
        self.made |= {tuple(t.shape) for t in made if t.data_ptr() not in given}
        return out


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext])
def test_cross_entropy_without_grad_computes_no_gradient(context: Any) -> None:
    """Autograd asks for those of all parameters, also where none will be taken: twice the work and more."""
    hidden, weight, labels = case(70)
    with context(), Shapes() as shapes:
        total = linear_cross_entropy(hidden, weight, labels)
    assert ((V, D) in shapes.made) == (context is nullcontext)
    exact, *_ = reference(hidden, weight, labels, 0.0)
    torch.testing.assert_close(total.detach().double(), exact, rtol=1e-5, atol=1e-5)


def test_cross_entropy_bf16_autocast_sums_in_float32() -> None:
    hidden, weight, labels = case(3000, ignored=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        total = linear_cross_entropy(hidden.bfloat16(), weight, labels)
    assert total.dtype == torch.float32
    by_hidden, by_weight = torch.autograd.grad(total, (hidden, weight))
    exact, exact_by_hidden, exact_by_weight = reference(hidden, weight, labels, 0.0)
    assert by_weight.dtype == by_hidden.dtype == torch.float32
    # A sum kept in bfloat16 would stop growing at about 500.
    assert total.item() == pytest.approx(exact.item(), rel=2e-3)
    assert (by_hidden.double() - exact_by_hidden).norm() < 0.01 * exact_by_hidden.norm()
    assert (by_weight.double() - exact_by_weight).norm() < 0.01 * exact_by_weight.norm()


class LargestTensor(TorchDispatchMode):
    """Remembers the elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.n_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.n_elements = max(self.n_elements, tensor.numel())
        return out


@pytest.mark.parametrize("vocab_size", [2_000, 50_000])
def test_cross_entropy_never_allocates_full_logits(vocab_size: int) -> None:
    n_tokens = 4 * max(SMALLEST_CHUNK, loss_module._CHUNK_BYTES // (4 * vocab_size))
    hidden = torch.randn(n_tokens, 2, requires_grad=True)
    weight = torch.randn(vocab_size, 2, requires_grad=True)
    with LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, torch.arange(n_tokens) % vocab_size, 0.1).backward()
    assert largest.n_elements <= max(SMALLEST_CHUNK * vocab_size, loss_module._CHUNK_BYTES // 4)
    assert largest.n_elements < n_tokens * vocab_size // 3

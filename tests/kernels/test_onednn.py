"""Matrix products through oneDNN against float64, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from psannlm.kernels import onednn
from psannlm.kernels.onednn import has_onednn, linear, matmul_tn, onednn_matmul
from psannlm.kernels.torch_private import onednn_linear

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this torch offers no product of oneDNN's")


@pytest.fixture
def detour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "prefers_onednn", lambda: True)


def leaves(n_rows: int, has_bias: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, n_rows, 48), (40, 48), (40,)][: 3 if has_bias else 2]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@needs_onednn
@pytest.mark.usefixtures("detour")
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("n_rows", [5, 33, 100])
def test_onednn_linear_gradients_match_float64(n_rows: int, has_bias: bool) -> None:
    ours = leaves(n_rows, has_bias)
    exact = [leaf.detach().double().requires_grad_() for leaf in ours]
    y, wanted = linear(*ours), torch.nn.functional.linear(*exact)
    torch.testing.assert_close(y, wanted.float(), rtol=1e-5, atol=1e-5)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(grad.float())
    wanted.backward(grad)
    for mine, reference in zip(ours, exact, strict=True):
        assert mine.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(mine.grad, reference.grad.float(), rtol=1e-5, atol=1e-4)


@needs_onednn
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.usefixtures("detour")
@pytest.mark.parametrize("has_bias", [False, True])
def test_onednn_computes_forward_and_input_gradient_when_compiled(
    monkeypatch: pytest.MonkeyPatch, has_bias: bool
) -> None:
    found: list[list[Tensor]] = []
    rows: list[int] = []

    def note(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows.append(len(x))
        return onednn_linear(x, weight, bias)

    for way in (linear, torch.compile(linear, backend="aot_eager", fullgraph=True)):
        leaves_of_way = leaves(100, has_bias)
        y = way(*leaves_of_way)
        y.square().sum().backward()
        found.append([y.detach(), *(leaf.grad for leaf in leaves_of_way if leaf.grad is not None)])
        monkeypatch.setattr(onednn, "onednn_linear", note)
    assert rows == [200, 200], "forward and gradient of the input; the gradient of this weight is MKL's"
    for mine, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, mine, rtol=1e-5, atol=1e-4)


@needs_onednn
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.usefixtures("detour")
@pytest.mark.parametrize(("n_out", "n_in", "is_onednn"), [(48, 96, True), (48, 95, False), (96, 48, False)])
def test_compiled_weight_gradient_library_depends_on_shape(
    monkeypatch: pytest.MonkeyPatch, n_out: int, n_in: int, is_onednn: bool
) -> None:
    used: list[bool] = []

    def note(x: Tensor, weight: Tensor) -> Tensor:
        used.append(True)
        return onednn_linear(x, weight)

    monkeypatch.setattr(onednn, "onednn_linear", note)
    left, right = torch.randn(128, n_out), torch.randn(128, n_in)
    found = torch.compile(matmul_tn, backend="aot_eager", fullgraph=True)(left, right)
    torch.testing.assert_close(found, left.t() @ right, rtol=1e-5, atol=1e-4)
    assert bool(used) == is_onednn


@needs_onednn
@pytest.mark.usefixtures("detour")
def test_onednn_linear_skips_frozen_weights() -> None:
    x, weight = leaves(100, has_bias=False)
    weight.requires_grad_(False)
    linear(x, weight).sum().backward()
    assert weight.grad is None
    assert x.grad is not None


@needs_onednn
def test_onednn_matmul_accepts_any_strides() -> None:
    left, right = torch.randn(70, 30).t(), torch.randn(50, 70).t()
    torch.testing.assert_close(onednn_matmul(left, right), left @ right, rtol=1e-5, atol=1e-5)


def test_onednn_is_not_used_for_other_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "prefers_onednn", lambda: pytest.fail("asked for"))
    x, weight = leaves(100, has_bias=False)
    assert linear(x.double(), weight.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with torch.no_grad():
        linear(x, weight)

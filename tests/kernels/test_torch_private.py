"""Each private torch API of ``kernels.torch_private`` against public operators: run after an upgrade of torch."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from psannlm.kernels import torch_private as private
from psannlm.kernels.compiler import has_compiler


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


needs_onednn = pytest.mark.skipif(not private.has_onednn_linear(), reason="torch was built without oneDNN")


@needs_onednn
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_reordered", [False, True])
def test_onednn_linear_matches_linear(has_bias: bool, is_reordered: bool) -> None:
    x, weight, bias = randn(5, 48), randn(40, 48), randn(40) if has_bias else None
    with torch.inference_mode():
        given = private.onednn_reordered(weight, 16) if is_reordered else weight
        found = private.onednn_linear(x, given, bias)
    torch.testing.assert_close(found, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_int8_matmul_matches_scaled_product() -> None:
    x, scale = randn(3, 32, dtype=torch.bfloat16), randn(8, dtype=torch.bfloat16).abs()
    weight = torch.randint(-127, 128, (8, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    found = private.int8_matmul(x, weight, scale)
    torch.testing.assert_close(found.float(), (x.float() @ weight.float().t()) * scale.float(), rtol=2e-2, atol=2e-1)


def test_softmax_backward_matches_autograd() -> None:
    x, grad = randn(4, 7).requires_grad_(), randn(4, 7)
    y = torch.softmax(x, -1)
    (wanted,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(private.softmax_backward(grad, y.detach()), wanted)


@pytest.mark.parametrize("is_gelu", [False, True])
def test_activation_backward_matches_autograd(is_gelu: bool) -> None:
    z, grad = randn(4, 7).requires_grad_(), randn(4, 7)
    (wanted,) = torch.autograd.grad(F.gelu(z) if is_gelu else F.silu(z), z, grad)
    torch.testing.assert_close(private.activation_backward(grad, z.detach(), is_gelu=is_gelu), wanted)


def test_realized_value_is_the_input() -> None:
    private.load_realize()
    x = randn(3, 4)
    function = torch.compile(lambda x: private.realized(x.sin()) * 2, backend="eager", fullgraph=True)
    torch.testing.assert_close(function(x), x.sin() * 2)


def test_mark_dynamic_avoids_recompilation() -> None:
    torch._dynamo.reset()
    function = torch.compile(lambda x: x * 2, backend="eager", fullgraph=True)
    before = private.compiler_counters()["stats"]["unique_graphs"]
    for n in (5, 6, 7):
        x = torch.ones(n)
        private.mark_dynamic(x, 0)
        assert function(x).tolist() == [2.0] * n
    assert private.compiler_counters()["stats"]["unique_graphs"] == before + 1


def test_mark_static_address_is_recorded_on_the_tensor() -> None:
    x = torch.ones(3)
    private.mark_static_address(x)
    assert getattr(x, "_dynamo_static_input_type", None) is not None


def test_storage_key_identifies_shared_memory() -> None:
    x, other = torch.ones(4), torch.ones(4)
    key = private.storage_key(x.untyped_storage())
    assert private.storage_key(x[1:].untyped_storage()) == key
    assert private.storage_key(other.untyped_storage()) != key
    with private.FakeTensorMode():
        fake, view = torch.ones(4), torch.ones(4)
        assert isinstance(fake, private.FakeTensor)
        assert private.storage_key(fake[1:].untyped_storage()) == private.storage_key(fake.untyped_storage())
        assert private.storage_key(view.untyped_storage()) != private.storage_key(fake.untyped_storage())


def test_foreach_operations_match_loops() -> None:
    targets, sources = [torch.zeros(2), torch.zeros(3)], [randn(2), randn(3)]
    private.foreach_copy_(targets, sources)
    assert all(map(torch.equal, targets, sources))
    private.foreach_mul_(targets, torch.tensor(2.0))
    assert all(torch.equal(target, 2 * source) for target, source in zip(targets, sources, strict=True))


def test_processor_and_build_features_are_booleans() -> None:
    assert {type(private.has_amx()), type(private.has_onednn_linear())} == {bool}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_manager_is_none_before_a_graph() -> None:
    assert private.cuda_graph_manager(torch.cuda.current_device()) is None


def test_uncompiled_function_is_never_traced() -> None:
    seen: list[bool] = []

    @private.uncompiled
    def shift(x: torch.Tensor, by: float) -> torch.Tensor:
        seen.append(torch.compiler.is_compiling())
        return x + by

    @torch.compile(backend="eager")
    def outer(x: torch.Tensor) -> torch.Tensor:
        return shift(x * 2, 3.0) * 2

    x = torch.arange(4.0)
    for _ in range(2):
        torch.testing.assert_close(outer(x), (x * 2 + 3) * 2)
    assert seen == [False, False], "compiled, the second call would run a graph and not this function"
    assert shift(x, 1.0)[0] == 1
    assert shift.__name__ == "shift"


def test_constant_while_compiling_is_never_traced() -> None:
    seen: list[bool] = []

    @private.constant_while_compiling
    def factor() -> float:
        seen.append(torch.compiler.is_compiling())
        return 3.0

    @torch.compile(backend="eager", fullgraph=True)
    def outer(x: torch.Tensor) -> torch.Tensor:
        return x * factor()

    x = torch.arange(4.0)
    for _ in range(2):
        torch.testing.assert_close(outer(x), x * 3)
    assert seen == [True], "called once, for the trace"


@pytest.mark.skipif(not (has_compiler(torch.device("cpu")) and private.can_compile_ahead()), reason="no C++ compiler")
def test_cpp_library_is_linked_to_by_others() -> None:
    private.load_cpp_library('extern "C" int psannlm_test_answer() { return 41; }')
    assert ctypes.CDLL(None).psannlm_test_answer() == 41

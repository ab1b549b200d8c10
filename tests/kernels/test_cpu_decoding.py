"""Products and attention of decoding steps in C++: close to float64, and the same bits for a row in any batch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from psannlm.kernels import cpu_decoding
from psannlm.kernels.compiler import has_compiler
from psannlm.kernels.torch_private import can_compile_ahead
from psannlm.models.positions import alibi_bias, alibi_slopes

pytestmark = pytest.mark.skipif(
    not (has_compiler(torch.device("cpu")) and can_compile_ahead()), reason="needs a C++ compiler and torch 2.13"
)

F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
PAIRS = [(F32, F32), (F32, BF16), (BF16, BF16), (F32, INT8), (BF16, INT8)]
Call = Callable[..., Tensor]


@pytest.fixture(scope="module", params=["widest vectors", "vectors of 256 bits"])
def call(request: pytest.FixtureRequest) -> Call:
    return library_call(None if request.param == "widest vectors" else 256)


def library_call(vector_bits: int | None) -> Call:
    """Return a function that calls a C function on tensors, of a library that nothing else links to."""
    from torch._inductor import config
    from torch._inductor.codecache import CppCodeCache

    source = (files("psannlm.kernels") / "cpu_decoding.cpp").read_text()
    with config.patch({"cpp.simdlen": vector_bits}):
        library = CppCodeCache.load(source, needs_vec_isa=True)

    def run(name: str, *tensors: Tensor, n_threads: int = 2) -> Tensor:
        function = library[f"aoti_torch_cpu_{name}"]
        handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
        capsule = ctypes.pythonapi.PyCapsule_GetPointer
        capsule.restype, capsule.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        pointers = [ctypes.c_void_p(capsule(handle, None)) for handle in handles]
        result = ctypes.c_void_p()
        failed = function(*pointers, ctypes.c_int64(n_threads), ctypes.byref(result))
        torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(handles)
        if failed:
            raise ValueError(name)
        return torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(_capsule(result))

    return run


def _capsule(pointer: ctypes.c_void_p) -> Any:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(pointer, None, None)


def randn(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (values * 40).round().clamp(-127, 127).to(dtype) if dtype == INT8 else values.to(dtype)


@pytest.mark.parametrize(("x_dtype", "weight_dtype"), PAIRS)
@pytest.mark.parametrize("n_in", [1, 7, 16, 28, 33, 100, 256])
def test_few_row_linear_matches_float64(call: Call, x_dtype: torch.dtype, weight_dtype: torch.dtype, n_in: int) -> None:
    for n_rows, n_out in [(1, 1), (1, 20), (2, 9), (3, 16), (8, 19), (17, 24)]:
        x, weight = randn(n_rows, n_in, dtype=x_dtype), randn(n_out, n_in, dtype=weight_dtype, seed=1)
        wanted = x.double() @ weight.double().t()
        bound = x.double().abs() @ weight.double().abs().t()
        found = call("few_row_linear", x, weight)
        assert found.dtype == F32
        assert ((found - wanted).abs() <= 1e-6 * bound).all()


@pytest.mark.parametrize(("x_dtype", "weight_dtype"), PAIRS)
def test_few_row_linear_is_same_in_any_batch(call: Call, x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """Also by any number of threads; 333 inputs end in the middle of a vector."""
    x, weight = randn(40, 333, dtype=x_dtype), randn(21, 333, dtype=weight_dtype, seed=1)
    alone = torch.cat([call("few_row_linear", row.clone(), weight, n_threads=1) for row in x.split(1)])
    for n_rows in [2, 3, 4, 7, 8, 13, 16, 40]:
        assert torch.equal(call("few_row_linear", x[:n_rows].clone(), weight), alone[:n_rows])
    assert torch.equal(call("few_row_linear", x, weight, n_threads=3), alone)


def test_few_row_linear_refuses_what_it_cannot_read(call: Call) -> None:
    x = randn(2, 8)
    for other in [randn(3, 9), randn(8, 3).t(), randn(3, 8, dtype=torch.float64), randn(1, 3, 8)]:
        with pytest.raises(ValueError, match="few_row_linear"):
            call("few_row_linear", x, other)
    with pytest.raises(ValueError, match="few_row_linear"):
        call("few_row_linear", x.bfloat16(), randn(3, 8))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("n_kv_heads", [4, 2])
@pytest.mark.parametrize("head_dim", [8, 24, 64, 80])
@pytest.mark.parametrize("has_alibi", [False, True])
def test_few_query_attention_matches_float64(
    call: Call, dtype: torch.dtype, n_kv_heads: int, head_dim: int, has_alibi: bool
) -> None:
    """Slots behind a query hold numbers that would be seen in the result."""
    q = randn(3, 2, 4, head_dim).transpose(1, 2)
    keys, values = (randn(3, n_kv_heads, 45, head_dim, dtype=dtype, seed=s) * 3 for s in (1, 2))
    positions = torch.tensor([[0, 1], [30, 31], [43, 44]])
    slopes = alibi_slopes(4) if has_alibi else torch.zeros(4)
    found = call("few_query_attention", q, keys, values, positions, slopes)
    bias = alibi_bias(slopes.double(), positions, torch.arange(45))
    wanted = F.scaled_dot_product_attention(q.double(), keys.double(), values.double(), bias, enable_gqa=True)
    torch.testing.assert_close(found.double(), wanted.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_few_query_attention_is_same_in_any_batch(call: Call) -> None:
    """With other rows and tokens, another capacity of the cache and another number of threads."""
    q, positions, slopes = randn(5, 4, 3, 24), torch.tensor([[17, 18, 19]] * 5), torch.zeros(4)
    keys, values = randn(5, 2, 40, 24, dtype=BF16, seed=1), randn(5, 2, 40, 24, dtype=BF16, seed=2)
    whole = call("few_query_attention", q, keys, values, positions, slopes, n_threads=3)
    for row in range(5):
        for token in range(3):
            used = [cache[row : row + 1, :, :20].clone() for cache in (keys, values)]
            query, position = (
                q[row : row + 1, :, token : token + 1],
                positions[row : row + 1, token : token + 1].clone(),
            )
            alone = call("few_query_attention", query, *used, position, slopes, n_threads=1)
            assert torch.equal(alone[0, 0], whole[row, token])


def test_few_query_attention_ignores_unused_slots(call: Call) -> None:
    """Not even NaN in slots that no query sees changes anything."""
    q, slopes, positions = randn(2, 4, 1, 16), torch.zeros(4), torch.tensor([[9], [3]])
    keys, values = randn(2, 4, 32, 16, seed=1), randn(2, 4, 32, 16, seed=2)
    clean = call("few_query_attention", q, keys, values, positions, slopes)
    for cache in (keys, values):
        cache[0, :, 10:] = float("nan")
        cache[1, :, 4:] = float("nan")
    assert torch.equal(call("few_query_attention", q, keys, values, positions, slopes), clean)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_code_calls_cpp_functions() -> None:
    """Compiled without the options they are refused, instead of computed by something else."""
    x, weight = randn(9, 1000), randn(24, 1000, seed=1)
    q, keys, values = randn(3, 4, 1, 64), randn(3, 4, 90, 64, seed=1), randn(3, 4, 90, 64, seed=2)
    cache = keys, values, torch.tensor([[5], [80], [89]]), torch.zeros(4)
    cpu_decoding.load_decoding_library()

    def step(x: Tensor, weight: Tensor, q: Tensor, *cache: Tensor) -> tuple[Tensor, Tensor]:
        return cpu_decoding.few_row_linear(x, weight) * 2, cpu_decoding.few_query_attention(q, *cache) * 2

    compiled = torch.compile(step, fullgraph=True, options=cpu_decoding.decoding_options())
    with torch.inference_mode():
        product, attention = compiled(x, weight, q, *cache)
    call = library_call(None)
    found = call("few_row_linear", x, weight), call("few_query_attention", q, *cache)
    assert torch.equal(product, found[0] * 2)
    assert torch.equal(attention, found[1] * 2)
    with pytest.raises(RuntimeError, match=r"compile with decoding_options\(\)"):
        step(x, weight, q, *cache)


def test_few_query_attention_refuses_positions_beyond_cache(call: Call) -> None:
    q, cache, slopes = randn(1, 2, 1, 8), randn(1, 2, 4, 8), torch.zeros(2)
    for position in (-1, 4):
        with pytest.raises(ValueError, match="few_query_attention"):
            call("few_query_attention", q, cache, cache, torch.tensor([[position]]), slopes)


def test_decoding_library_failure_names_cause_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("g++: fatal error: no such file")

    monkeypatch.setattr(cpu_decoding, "load_decoding_library", fail)
    failure = cpu_decoding.decoding_library_failure()
    assert failure is not None
    assert "fatal error: no such file" in failure
    assert "check that g++ works" in failure

"""Private PyTorch APIs: every use of one in the library, in one place, each with a public meaning and a test.

Checked with torch 2.13.0. None is covered by torch's compatibility promise: after an upgrade of torch run
``tests/kernels/test_torch_private.py``, which calls each function here and compares it with public operators.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

# torch._subclasses.fake_tensor, torch 2.13: tensors with a shape and no memory, re-exported here.
__all__ = [
    "LOAD_ERRORS",
    "FakeTensor",
    "FakeTensorMode",
    "activation_backward",
    "can_compile_ahead",
    "compiled_ahead",
    "compiler_counters",
    "constant_while_compiling",
    "cuda_graph_manager",
    "dump_compiled",
    "foreach_copy_",
    "foreach_mul_",
    "has_amx",
    "has_onednn_linear",
    "inductor_cache_folder",
    "inductor_settings",
    "int8_matmul",
    "load_compiled",
    "load_cpp_library",
    "load_realize",
    "mark_dynamic",
    "mark_static_address",
    "onednn_linear",
    "onednn_reordered",
    "options_of_c_functions",
    "realized",
    "softmax_backward",
    "storage_key",
    "uncompiled",
]

# What torch raises for a compiled function of another version, or one that is damaged.
LOAD_ERRORS = (
    UnpicklingError,
    EOFError,
    RuntimeError,
    AttributeError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
    AssertionError,
)

_P = ParamSpec("_P")
_T = TypeVar("_T")


def has_onednn_linear() -> bool:
    """Whether torch was built with oneDNN and offers :func:`onednn_linear`."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_onednn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias`` through oneDNN on a CPU, of x (..., In), weight (Out, In) and bias (Out,).

    The operator that inductor uses for fused linear layers; "none" names no fused activation. ``weight`` may be a
    result of :func:`onednn_reordered`.
    """
    # torch.ops.mkldnn._linear_pointwise, torch 2.13: (x, weight, bias, activation, scalars, algorithm).
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def onednn_reordered(weight: Tensor, n_rows: int) -> Tensor:
    """Return ``weight`` (Out, In) in the blocked layout that oneDNN multiplies fastest for ``n_rows`` rows."""
    # torch.ops.mkldnn._reorder_linear_weight, torch 2.13: (weight, expected rows).
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), n_rows)
    return reordered


def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 in tiles (AMX)."""
    # torch.cpu._is_amx_tile_supported, torch 2.13.
    return bool(torch.cpu._is_amx_tile_supported())


def int8_matmul(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return ``(x @ weight.T) * scale`` of bfloat16 x (M, In), int8 weight (Out, In) and bfloat16 scale (Out,).

    In must be a multiple of 16: the CPU kernel reads inputs in groups of 16.
    """
    # torch.ops.aten._weight_int8pack_mm, torch 2.13: (x, weight, scale), the kernel of torchao for CPUs.
    y: Tensor = torch.ops.aten._weight_int8pack_mm(x, weight, scale)
    return y


def softmax_backward(grad: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of the input of ``y = softmax(x, -1)``: y * (grad - sum(grad * y, -1))."""
    # torch._softmax_backward_data, torch 2.13: (grad, output, dim, dtype of the input).
    grad_x: Tensor = torch._softmax_backward_data(grad, y, -1, y.dtype)
    return grad_x


def activation_backward(grad: Tensor, z: Tensor, *, is_gelu: bool) -> Tensor:
    """Return the gradient of ``z`` through GELU (exact), or else through SiLU."""
    # torch.ops.aten.gelu_backward and silu_backward, torch 2.13: (grad, input).
    backward = torch.ops.aten.gelu_backward if is_gelu else torch.ops.aten.silu_backward
    grad_z: Tensor = backward(grad, z)
    return grad_z


def load_realize() -> None:
    """Import the module that registers the operator of :func:`realized`; it takes about a second."""
    # torch._inductor.test_operators, torch 2.13.
    import torch._inductor.test_operators  # noqa: F401


def realized(x: Tensor) -> Tensor:
    """Return ``x``, computed once and stored in memory, inside a function that inductor compiles.

    The operator belongs to inductor's own tests; there is no public one that ends a fusion.
    """
    # torch.ops._inductor_test.realize, torch 2.13.
    y: Tensor = torch.ops._inductor_test.realize(x)
    return y


def uncompiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return ``function``, at which torch.compile ends its graph and which it runs as it is.

    This is ``torch.compiler.disable``, which however imports the compiler when it decorates a function: that takes as
    long as importing torch itself, and a process that compiles nothing need not wait for it.
    """
    # torch._compile._disable_dynamo, torch 2.13: imports the compiler at the first call, which here is traced by it.
    disabled = torch._compile._disable_dynamo(function)

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        return (disabled if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return cast(Callable[_P, _T], call)


def constant_while_compiling(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return ``function``, which torch.compile calls while it traces, and whose result it keeps as a constant.

    This is ``torch.compiler.assume_constant_result``, which however imports the compiler when it decorates a function.
    """
    # The attribute _dynamo_marked_constant, torch 2.13.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def mark_dynamic(x: Tensor, dim: int) -> None:
    """Let a compiled function take any size of ``x`` along ``dim``, as far as the compiler can."""
    # torch._dynamo.maybe_mark_dynamic, torch 2.13: unlike mark_dynamic it does not fail where the size is fixed.
    torch._dynamo.maybe_mark_dynamic(x, dim)


def mark_static_address(x: Tensor) -> None:
    """Declare to the compiler that ``x`` keeps its address, so that CUDA graphs may write into it."""
    # torch._dynamo.mark_static_address, torch 2.13.
    torch._dynamo.mark_static_address(x)


def can_compile_ahead() -> bool:
    """Whether this torch has what :func:`compiled_ahead` needs, in the form that it was tested with."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 13)


def compiled_ahead(function: Callable[..., _T], args: tuple[Any, ...], options: dict[str, Any]) -> Callable[..., _T]:
    """Return ``function`` compiled by inductor for arguments like ``args``, as a whole and without guards.

    Unlike what torch.compile returns it can be kept: :func:`dump_compiled`.
    """
    # The method aot_compile, torch 2.13, of what torch.compile returns.
    ahead = torch.compile(function, fullgraph=True, options=options).aot_compile((args, {}))  # type: ignore[attr-defined]
    ahead.disable_guard_check()
    return cast(Callable[..., _T], ahead)


def dump_compiled(ahead: Callable[..., object], modules: dict[str, torch.nn.Module]) -> bytes:
    """Return a result of :func:`compiled_ahead` as bytes; ``modules`` among its arguments are not part of it."""
    # torch._dynamo.aot_compile.AOTCompiledFunction and torch._inductor.cpu_vec_isa, torch 2.13.
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    content: bytes = type(ahead).serialize(ahead, modules).serialized_data  # type: ignore[attr-defined]
    return f"{pick_vec_isa()}\n".encode() + content


def load_compiled(content: bytes, modules: dict[str, torch.nn.Module], options: dict[str, Any]) -> Callable[..., Any]:
    """Return what :func:`dump_compiled` got, with the options it was compiled with. torch unpickles ``content``.

    Raises:
        ValueError: inductor now computes with other vector instructions.
        Exception: one of ``LOAD_ERRORS``, where the content is damaged or of another version.
    """
    # torch._dynamo.aot_compile.AOTCompiledFunction, the settings of inductor and torch._inductor.cpu_vec_isa, torch
    # 2.13. The options are part of the names under which inductor finds its binaries.
    from torch._dynamo.aot_compile import AOTCompiledFunction
    from torch._inductor.cpu_vec_isa import pick_vec_isa, valid_vec_isa_list

    isa, _, dumped = content.partition(b"\n")
    settings = {name: value for name, value in options.items() if name != "guard_filter_fn"}
    # Without the setting, inductor starts processes to find out which vector instructions work, which takes a second.
    with torch._inductor.config.patch({**settings, "cpp.vec_isa_ok": True}):
        if str(pick_vec_isa()).encode() != isa:
            valid_vec_isa_list.cache_clear()
            raise ValueError(f"compiled for {isa!r:.40}")
        ahead = AOTCompiledFunction.deserialize(dumped, None, modules)
    ahead.disable_guard_check()
    return ahead


def options_of_c_functions(declarations: dict[torch._ops.OpOverload, str]) -> dict[str, Any]:
    """Return options under which compiled C++ code calls a C function for each operator, given its declaration.

    Its name is ``aoti_torch_cpu_`` and that of the operator; without it the call would go through Python.
    """
    # The setting aot_inductor.custom_ops_to_c_shims, torch 2.13, which counts for the option cpp_wrapper too.
    return {"cpp_wrapper": True, "aot_inductor.custom_ops_to_c_shims": {op: [c] for op, c in declarations.items()}}


def load_cpp_library(source: str, *, trusts_vectors: bool = False) -> None:
    """Compile C++ with vector instructions as inductor's own code, and load it for all later code to link to.

    Args:
        trusts_vectors: do without inductor's trials, which take a second, of which vector instructions compile.
    """
    # torch._inductor.codecache.CppCodeCache, torch 2.13, which loads a library for its caller alone.
    from torch._inductor.codecache import CppCodeCache

    class ForAll(CppCodeCache):
        cache: dict[str, Any] = {}  # noqa: RUF012 - as in the base class

        @staticmethod
        def _load_library_inner(path: str, key: str) -> ctypes.CDLL:
            return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)

    with torch._inductor.config.patch({"cpp.vec_isa_ok": True} if trusts_vectors else {}):
        ForAll.load(source, needs_vec_isa=True)


def inductor_settings() -> dict[str, Any]:
    """Return the settings of the compiler, environment variables for them included."""
    # torch._inductor.config.save_config_portable, torch 2.13.
    import torch._inductor.config

    settings: dict[str, Any] = torch._inductor.config.save_config_portable()
    return settings


def compiler_counters() -> dict[str, Counter[str]]:
    """Return the compiler's counters of this process by subject, such as graph breaks and CUDA graphs skipped."""
    # torch._dynamo.utils.counters, torch 2.13.
    from torch._dynamo.utils import counters

    return counters


def inductor_cache_folder() -> Path:
    """Return the folder of inductor's cache, which need not exist; raises KeyError for a user without a name."""
    # torch._inductor.runtime.cache_dir_utils.default_cache_dir, torch 2.13; its cache_dir makes the folder.
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir())


def cuda_graph_manager(device_index: int) -> Any:
    """Return the manager of the CUDA graphs that inductor recorded on a device, or None where it recorded none."""
    # torch._inductor.cudagraph_trees.get_manager, torch 2.13.
    from torch._inductor.cudagraph_trees import get_manager

    return get_manager(device_index, create_if_none_exists=False)


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return a number that identifies the memory of a storage while it exists, fake tensors included."""
    # UntypedStorage._cdata, torch 2.13: data_ptr is 0 or refused for fake tensors.
    return int(storage._cdata)


def foreach_copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, in few kernels."""
    # torch._foreach_copy_, torch 2.13: the operators of the fused optimizers.
    torch._foreach_copy_(list(targets), list(sources))


def foreach_mul_(tensors: Sequence[Tensor], factor: Tensor | float) -> None:
    """Multiply each tensor by ``factor`` in place, in few kernels."""
    # torch._foreach_mul_, torch 2.13.
    torch._foreach_mul_(list(tensors), factor)

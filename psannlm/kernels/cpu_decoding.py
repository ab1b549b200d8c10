"""Products and attention of compiled decoding steps on a CPU, in C++ (cpu_decoding.cpp).

Loops that a compiler derives from sums read weights at a third of the memory's bandwidth, as they ask for nothing in
advance. Here a weight is read once for all rows, and asked for 16 KB before it is used.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from psannlm.kernels.compiler import failure_of, has_passed_trial
from psannlm.kernels.torch_private import (
    can_compile_ahead,
    constant_while_compiling,
    load_cpp_library,
    options_of_c_functions,
)

_H = "AtenTensorHandle"
_C_FUNCTIONS = {
    "few_row_linear": f"AOTITorchError aoti_torch_cpu_few_row_linear({_H}, {_H}, int64_t, {_H}*)",
    "few_query_attention": (
        f"AOTITorchError aoti_torch_cpu_few_query_attention({_H}, {_H}, {_H}, {_H}, {_H}, int64_t, {_H}*)"
    ),
}

torch.library.define("psannlm::few_row_linear", "(Tensor x, Tensor weight, int n_threads) -> Tensor")
torch.library.define(
    "psannlm::few_query_attention",
    "(Tensor q, Tensor keys, Tensor values, Tensor positions, Tensor slopes, int n_threads) -> Tensor",
)


def _refuse(*_: object) -> Tensor:
    raise RuntimeError("an operator of compiled decoding was called from Python; compile with decoding_options()")


for _name in _C_FUNCTIONS:
    torch.library.impl(f"psannlm::{_name}", "CPU", _refuse)


@torch.library.register_fake("psannlm::few_row_linear")  # type: ignore[untyped-decorator]
def _fake_linear(x: Tensor, weight: Tensor, n_threads: int) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@torch.library.register_fake("psannlm::few_query_attention")  # type: ignore[untyped-decorator]
def _fake_attention(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, slopes: Tensor, n_threads: int
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


@constant_while_compiling
def _is_supported() -> bool:
    return can_compile_ahead()


def decodes_in_cpp(device: torch.device) -> bool:
    """Whether compiled decoding steps on ``device`` call the functions below: on a CPU, with a torch that can."""
    return device.type == "cpu" and _is_supported()


def calls_cpp(device: torch.device) -> bool:
    """Whether the code around is being compiled, and then calls the functions below."""
    return torch.compiler.is_compiling() and decodes_in_cpp(device)


@constant_while_compiling
def _n_threads() -> int:
    return torch.get_num_threads()


def few_row_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T`` (M, Out) float32, for code compiled with the options of :func:`decoding_options`.

    Factors are multiplied as they are, and added in float32. A row gets the same result whatever the number of rows.

    Args:
        x: (M, In) float32, or bfloat16 with a weight of bfloat16 or int8.
        weight: (Out, In) float32, bfloat16 or int8, in row-major order.
    """
    y: Tensor = torch.ops.psannlm.few_row_linear(x, weight, _n_threads())
    return y


def few_query_attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, slopes: Tensor) -> Tensor:
    """Return softmax(q kᵀ / √K + bias) v as (B, T, H, K) float32, for code compiled as for :func:`few_row_linear`.

    The query of head h at position p sees the slots up to p, with the bias slopes[h] (slot - p). A query gets the same
    result whatever the other rows, the number of tokens and the capacity.

    Args:
        q: (B, H, T, K) float32.
        keys: (B, G, S, K) float32 or bfloat16, a whole KV cache, of which H is a multiple of G.
        values: as ``keys``.
        positions: (B, T) int64, of the queries.
        slopes: (H,) float32, zeros without ALiBi.
    """
    y: Tensor = torch.ops.psannlm.few_query_attention(q, keys, values, positions, slopes, _n_threads())
    return y


def decoding_options() -> dict[str, Any]:
    """Return options of the compiler under which the functions above are calls into C++."""
    return options_of_c_functions({getattr(torch.ops.psannlm, name).default: c for name, c in _C_FUNCTIONS.items()})


@lru_cache(maxsize=1)
def load_decoding_library() -> None:
    """Load the C++ functions, before code that calls them; after the first time the compiler's cache holds them."""
    source = (files("psannlm.kernels") / "cpu_decoding.cpp").read_text(encoding="utf-8")
    # A cache folder may be shared by machines with other processors.
    load_cpp_library(f"// {sorted(torch.cpu.get_capabilities().items())}\n{source}", trusts_vectors=has_passed_trial())


def decoding_library_failure() -> str | None:
    """Load the C++ functions; return why they cannot be compiled or loaded, or None."""
    return failure_of(load_decoding_library, "cpu")

"""Preparation of a model for inference: joined projections, weights in float32, bfloat16 or int8.

A decoding step reads every weight once, so that its time is proportional to their bytes. A product is (M, In) x
(In, Out); other letters as in ``psannlm.models``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psannlm.errors import GenerationError, nearest
from psannlm.kernels.cpu_decoding import calls_cpp, few_row_linear
from psannlm.kernels.huge_pages import zeros_in_huge_pages
from psannlm.kernels.torch_private import has_amx, has_onednn_linear, int8_matmul, onednn_linear, onednn_reordered
from psannlm.models.activations import ParametricActivation
from psannlm.models.kv_cache import MAX_DECODE_TOKENS
from psannlm.models.mlp import GatedMlp
from psannlm.models.short_conv import ShortConv
from psannlm.models.transformer import Block, Transformer
from psannlm.runtime.device import computes_in_bf16

WeightDtype = Literal["float32", "bfloat16", "int8"]
STORED: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}

# Rows of every product of a prefill, where products must have one shape. Twice as many slow a short prompt down, half
# as many a long one.
_PREFILL_ROWS = 128


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``weight`` (Out, In) as symmetric int8 and a float32 scale (Out,): each row's largest becomes 127."""
    scale = weight.float().abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127.0
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def in_fixed_row_blocks(matmul: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``matmul`` of x (..., T, In), computed for a fixed number of rows at a time, the last block zero-padded.

    So every product has one shape, and a row gets the same sums in any batch. A tile of AMX holds 16 rows, so that
    fewer would take as long; a prefill uses larger blocks, which read the weight less often.
    """
    n = MAX_DECODE_TOKENS if x.shape[-2] <= MAX_DECODE_TOKENS else _PREFILL_ROWS
    rows = x.flatten(0, -2)
    n_missing = -len(rows) % n
    if n_missing:
        rows = F.pad(rows, (0, 0, 0, n_missing))
    parts = [matmul(part) for part in torch.split(rows, n)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y[: len(rows) - n_missing].view(*x.shape[:-1], -1)


class InferenceLinear(nn.Module):
    """x Wᵀ + b with W in float32, bfloat16 or int8 (weights only: W ≈ scale · int8, one scale per output).

    Uncompiled and for ``bfloat16`` and ``int8``, input and result of the product are rounded to bfloat16 where the
    device has bfloat16 hardware; sums are in float32. In C++ (compiled, on a CPU) the result stays float32.

    Args:
        weight: (Out, In), any floating dtype.
        bias: (Out,) or None.
        dtype: of the stored weight.
        is_compiled: store W in row-major order, which a compiler needs; else in oneDNN's blocked order.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: WeightDtype, *, is_compiled: bool) -> None:
        super().__init__()
        self.n_outputs, self.n_inputs = weight.shape
        scale = None
        if dtype == "int8":
            weight, scale = quantize(weight)
        else:
            weight = weight.to(STORED[dtype])
        self.n_bytes = weight.numel() * weight.element_size()
        self.in_bf16 = dtype != "float32" and computes_in_bf16(weight.device)
        # AMX multiplies in tiles, and oneDNN then splits sums by the number of rows.
        self.sums_in_tiles = self.in_bf16 and weight.device.type == "cpu" and has_amx()
        self.uses_onednn = (
            weight.device.type == "cpu"
            and dtype != "int8"
            and (self.in_bf16 or dtype == "float32")
            and has_onednn_linear()
        )
        # Without bfloat16 hardware a weight of fewer bytes becomes float32 for each product.
        self.is_widened = (
            weight.device.type == "cpu" and dtype != "float32" and not self.in_bf16 and has_onednn_linear()
        )
        if self.uses_onednn and not is_compiled:
            weight = onednn_reordered(weight, MAX_DECODE_TOKENS)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., T, In) to (..., T, Out), in float32 or bfloat16."""
        n_rows = x.numel() // self.n_inputs
        if self.in_bf16:
            x = x.bfloat16()
        if calls_cpp(x.device):
            y = few_row_linear(x.flatten(0, -2), self.weight).view(*x.shape[:-1], self.n_outputs)
            y = y if self.scale is None else y * self.scale
        elif self.uses_onednn and not torch.compiler.is_compiling():
            if self.sums_in_tiles:
                y = in_fixed_row_blocks(lambda rows: onednn_linear(rows, self.weight), x)
            else:
                # oneDNN sums a single row of many inputs in another order than several rows: compute it twice.
                pair = x.expand(*x.shape[:-2], 2, -1) if n_rows == 1 and self.n_inputs > 1024 else x
                y = onednn_linear(pair, self.weight)[..., : x.shape[-2], :]
        elif self.is_widened and not torch.compiler.is_compiling():
            # oneDNN, which gives a row the same sums among others; MKL, torch's default for float32, does not.
            pair = x.expand(*x.shape[:-2], 2, -1) if n_rows == 1 else x
            y = onednn_linear(pair, self.weight.to(x.dtype))[..., : x.shape[-2], :]
            y = y if self.scale is None else y * self.scale
        elif self.scale is None:
            y = F.linear(x, self.weight.to(x.dtype))
        elif self._fits_int8_matmul(x):
            flat = int8_matmul(x.flatten(0, -2), self.weight, self.scale.bfloat16())
            y = flat.view(*x.shape[:-1], self.n_outputs)
        else:
            weight = self.weight.to(x.dtype)
            in_tiles = self.sums_in_tiles and not torch.compiler.is_compiling()
            y = in_fixed_row_blocks(lambda rows: F.linear(rows, weight), x) if in_tiles else F.linear(x, weight)
            y = y * self.scale
        return y if self.bias is None else y + self.bias

    def _fits_int8_matmul(self, x: Tensor) -> bool:
        # The kernel reads inputs in groups of 16, past the end of a row whose length is not a multiple.
        if torch.compiler.is_compiling() or not self.in_bf16 or x.device.type != "cpu":
            return False
        return x.shape[-2] <= MAX_DECODE_TOKENS and self.n_inputs % 16 == 0

    def extra_repr(self) -> str:
        return f"{self.n_inputs} to {self.n_outputs}, {self.weight.dtype}"


def prepare_for_inference(
    model: Transformer, dtype: WeightDtype, *, is_compiled: bool = False, in_place: bool = False
) -> Transformer:
    """Return a copy of ``model`` for inference, which shares norms and convolutions with it; ``model`` is not changed.

    ``in_place``, ``model`` itself is prepared and returned: each matrix is freed when its successor is made, and at the
    end the mapped file that the weights were loaded from, of which nothing is left in use.

    The projections of queries, keys and values become one product, gate and up projection another. Residual scales are
    folded into the weights they multiply, and parameters of activations are stored as values. The embedding is stored
    in bfloat16 unless ``dtype`` is float32. Norms, short convolutions and parameters of activations stay float32.

    Raises:
        GenerationError: unknown ``dtype``.
    """
    if dtype not in STORED:
        names = get_args(WeightDtype)
        raise GenerationError(f"dtype {dtype!r:.40} is not one of {', '.join(names)}{nearest(str(dtype), names)}")
    copied = model
    if not in_place:
        shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
        copied = copy.deepcopy(model, shared)
    copied.eval()

    def joined(*layers: nn.Module, scale: Tensor | None = None) -> InferenceLinear:
        linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        weight = torch.cat([linear.weight.detach() for linear in linears])
        bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
        if scale is not None:
            weight = weight * scale.detach()
            bias = None if bias is None else bias * scale.detach()
        return InferenceLinear(weight, bias, dtype, is_compiled=is_compiled)

    for block in copied.blocks:
        assert isinstance(block, Block)
        attention, mlp = block.attention, block.mlp
        if attention.features is not None:
            attention.features.proj = joined(attention.features.proj)
        attention.qkv_proj = joined(attention.q_proj, attention.k_proj, attention.v_proj)
        attention.out_proj = joined(attention.out_proj, scale=block.attention_scale)
        del attention.q_proj, attention.k_proj, attention.v_proj
        if isinstance(mlp, GatedMlp):
            mlp.gate_up_proj = joined(mlp.gate_proj, mlp.up_proj)
            del mlp.gate_proj, mlp.up_proj
        else:
            mlp.up_proj = joined(mlp.up_proj)
        mlp.down_proj = joined(mlp.down_proj, scale=block.mlp_scale)
        block.attention_scale = block.mlp_scale = None
    for module in copied.modules():
        if isinstance(module, ParametricActivation):
            module.freeze()
        elif isinstance(module, ShortConv):
            module.taps = module.weight.detach().t().contiguous()
    embedding = model.embedding.weight.detach()
    copied.head = InferenceLinear(model.output_weight.detach(), None, dtype, is_compiled=is_compiled)
    if dtype != "float32":
        copied.embedding = nn.Embedding(embedding.shape[0], embedding.shape[1], _weight=embedding.bfloat16())
    if in_place:
        _leave_mapped_file(copied)
    _move_to_huge_pages(copied)
    return copied


def _move_to_huge_pages(model: Transformer) -> None:
    """Move matrices in row-major order into huge pages, one after the other, where the system has them."""
    embedding = model.embedding.weight.untyped_storage()
    linears = [
        module
        for module in model.modules()
        if isinstance(module, InferenceLinear)
        and module.weight.device.type == "cpu"
        and not module.weight.is_mkldnn
        # Not one that would be in memory twice then.
        and module.weight.untyped_storage().data_ptr() != embedding.data_ptr()
    ]
    shapes, dtypes = [linear.weight.shape for linear in linears], [linear.weight.dtype for linear in linears]
    for linear, moved in zip(linears, zeros_in_huge_pages(shapes, dtypes) or (), strict=False):
        linear.weight = moved.copy_(linear.weight)


def _leave_mapped_file(model: nn.Module) -> None:
    """Copy the tensors that are still those of a file: it stays mapped, with every page read of it, until the last."""
    for tensor in model.state_dict(keep_vars=True).values():
        tensor.data = tensor.detach().clone()


def weight_bytes(model: Transformer) -> int:
    """Return the bytes of the prepared matrices, each of which a decoding step reads once."""
    return sum(module.n_bytes for module in model.modules() if isinstance(module, InferenceLinear))

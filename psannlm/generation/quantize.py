"""A trained model in, the same model with its matrices packed for inference out: joined, and in fewer bits if asked.

Decoding reads every weight once per step, so that bytes are time. Letters: O and K outputs and inputs of a matrix, T
new tokens, M rows of a product.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from itertools import chain
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psannlm.errors import GenerationError, nearest
from psannlm.kernels.compile import realize
from psannlm.models.activations import SineActivation
from psannlm.models.kv_cache import MAX_DECODE_TOKENS
from psannlm.models.mlp import GatedMlp
from psannlm.models.short_conv import ShortConv
from psannlm.models.transformer import Block, Transformer
from psannlm.runtime.device import computes_in_bf16

WeightDtype = Literal["float32", "bfloat16", "int8"]
STORED: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}

# Rows of a compiled product that are summed side by side, so that a weight is read and widened once for all of them.
_ROWS_AT_ONCE = 16
# Rows of a product of a prefill, where products have to be of one shape: with twice as many a short prompt would take
# longer, with half as many a long one.
_PREFILL_ROWS = 128
# Outputs that are summed beside each other for more than one row, so that an input is read once for both.
_OUTPUTS_AT_ONCE = 2


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``weight`` (O, K) as int8, and the float32 scale (O,) of each output: symmetric, the largest is 127."""
    scale = weight.float().abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127.0
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


@lru_cache(maxsize=1)
def _has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 in tiles (AMX), where oneDNN splits sums by how many rows there are."""
    return bool(torch.cpu._is_amx_tile_supported())


def _onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def by_tiles(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``product`` of x (..., T, K) made for so many rows at a time, the last ones filled up with zeros.

    So every product is of one shape, and a row meets the same sums in any company. Sixteen rows are what a tile of AMX
    holds, and fewer would take as long; a prefill reads the weight once for more.
    """
    n = MAX_DECODE_TOKENS if x.shape[-2] <= MAX_DECODE_TOKENS else _PREFILL_ROWS
    rows = x.flatten(0, -2)
    n_missing = -len(rows) % n
    if n_missing:
        rows = F.pad(rows, (0, 0, 0, n_missing))
    parts = [product(part) for part in torch.split(rows, n)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y[: len(rows) - n_missing].view(*x.shape[:-1], -1)


class PackedLinear(nn.Module):
    """x Wᵀ + b with W in float32, bfloat16 or int8 (weights only: W ≈ scale · int8, a scale per output).

    Outside a compiler and for ``bfloat16`` and ``int8`` the input of the product is rounded to bfloat16 where the
    device multiplies in it, and so is the result; sums are in float32. Compiled for at most 16 rows on a CPU, input and
    result stay float32.

    Args:
        weight: (O, K), any floating dtype.
        bias: (O,) or None.
        dtype: what to keep the weight in.
        is_compiled: keep W in its plain order, which a compiler needs; else in the order oneDNN multiplies fastest.
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
        self.sums_in_tiles = self.in_bf16 and weight.device.type == "cpu" and _has_amx()
        self.uses_onednn = (
            weight.device.type == "cpu"
            and dtype != "int8"
            and (self.in_bf16 or dtype == "float32")
            and torch._C._has_mkldnn
        )
        if self.uses_onednn and not is_compiled:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), MAX_DECODE_TOKENS)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., T, K) to (..., T, O), in float32 or bfloat16."""
        n_rows = x.numel() // self.n_inputs
        if torch.compiler.is_compiling() and x.device.type == "cpu" and n_rows <= _ROWS_AT_ONCE:
            return self._in_sums(x)
        if self.in_bf16:
            x = x.bfloat16()
        if self.uses_onednn and not torch.compiler.is_compiling():
            if self.sums_in_tiles:
                y = by_tiles(lambda rows: _onednn_linear(rows, self.weight), x)
            else:
                # Alone, a row of many inputs would be summed in another order than in company.
                pair = x.expand(*x.shape[:-2], 2, -1) if n_rows == 1 and self.n_inputs > 1024 else x
                y = _onednn_linear(pair, self.weight)[..., : x.shape[-2], :]
        elif self.scale is None:
            y = F.linear(x, self.weight.to(x.dtype))
        elif self.in_bf16 and x.device.type == "cpu" and x.shape[-2] <= MAX_DECODE_TOKENS and self.n_inputs % 16 == 0:
            # The kernel reads inputs by sixteens, beyond the end of a row if there are fewer.
            flat = torch.ops.aten._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale.bfloat16())
            y = flat.view(*x.shape[:-1], self.n_outputs)
        else:
            weight = self.weight.to(x.dtype)
            in_tiles = self.sums_in_tiles and not torch.compiler.is_compiling()
            y = by_tiles(lambda rows: F.linear(rows, weight), x) if in_tiles else F.linear(x, weight)
            y = y * self.scale
        return y if self.bias is None else y + self.bias

    def _in_sums(self, x: Tensor) -> Tensor:
        """A product as one sum per row: a compiler fuses them into a single pass over the weight."""
        rows = realize(x.float()).flatten(0, -2).unbind(0)
        n_parts = _OUTPUTS_AT_ONCE if len(rows) > 1 and self.n_outputs % _OUTPUTS_AT_ONCE == 0 else 1
        parts = self.weight.float().view(n_parts, -1, self.n_inputs).unbind(0)
        # One flat list of sums: the compiler lets each write its place in the whole, and copies what is joined twice.
        y = torch.cat([(part * row).sum(-1) for row in rows for part in parts]).view(*x.shape[:-1], self.n_outputs)
        if self.scale is not None:
            y = y * self.scale
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.n_inputs} to {self.n_outputs}, {self.weight.dtype}"


def pack_model(model: Transformer, dtype: WeightDtype, *, is_compiled: bool = False) -> Transformer:
    """Return a twin of ``model`` for inference; what it does not pack it shares with the original, which is left alone.

    Queries, keys and values become one product, gate and up projection another, the residual scales part of the
    weights they multiply, and the sine's parameters numbers instead of their raw form. The embedding is kept in
    bfloat16 unless ``dtype`` is float32. Norms, short convolutions and sines stay float32.

    Raises:
        GenerationError: ``dtype`` is not known.
    """
    if dtype not in STORED:
        names = get_args(WeightDtype)
        raise GenerationError(f"dtype {dtype!r:.40} is not one of {', '.join(names)}{nearest(str(dtype), names)}")
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin: Transformer = copy.deepcopy(model, shared)
    twin.eval()

    def pack(*layers: nn.Module, scale: Tensor | None = None) -> PackedLinear:
        linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        weight = torch.cat([linear.weight.detach() for linear in linears])
        bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
        if scale is not None:
            weight = weight * scale.detach()
            bias = None if bias is None else bias * scale.detach()
        return PackedLinear(weight, bias, dtype, is_compiled=is_compiled)

    for block in twin.blocks:
        assert isinstance(block, Block)
        attention, mlp = block.attention, block.mlp
        attention.qkv_proj = pack(attention.q_proj, attention.k_proj, attention.v_proj)
        attention.out_proj = pack(attention.out_proj, scale=block.attention_scale)
        del attention.q_proj, attention.k_proj, attention.v_proj
        if isinstance(mlp, GatedMlp):
            mlp.gate_up_proj = pack(mlp.gate_proj, mlp.up_proj)
            del mlp.gate_proj, mlp.up_proj
        else:
            mlp.up_proj = pack(mlp.up_proj)
        mlp.down_proj = pack(mlp.down_proj, scale=block.mlp_scale)
        block.attention_scale = block.mlp_scale = None
    for module in twin.modules():
        if isinstance(module, SineActivation):
            module.freeze()
        elif isinstance(module, ShortConv):
            module.taps = module.weight.detach().t().contiguous()
    twin.head = PackedLinear(model.output_weight.detach(), None, dtype, is_compiled=is_compiled)
    if dtype != "float32":
        vocab_size, width = model.embedding.weight.shape
        twin.embedding = nn.Embedding(vocab_size, width, _weight=model.embedding.weight.detach().bfloat16())
    return twin


def weight_bytes(model: Transformer) -> int:
    """Return the bytes of the packed matrices, each of which one decoding step reads once."""
    return sum(module.n_bytes for module in model.modules() if isinstance(module, PackedLinear))

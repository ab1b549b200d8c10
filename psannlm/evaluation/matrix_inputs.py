"""Inputs of a model's matrix products: where they are, hooks that read or replace them, and how heavy their tails are.

What is meant are the products with weights. The products of attention itself (scores, and their mean of the values) and
short convolutions are not among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from psannlm.config.constants import MatrixPlace
from psannlm.models.mlp import GatedMlp
from psannlm.models.transformer import Block, Transformer

Place = MatrixPlace
PLACES: tuple[Place, ...] = get_args(Place)


@dataclass(frozen=True)
class MatrixInput:
    """An input (B, T, In) that one or several matrices share.

    Attributes:
        place: which product of a block it is, or the head.
        layer: number of the block; None for the head.
        modules: those that read it. With ``is_output`` the one that computes it: the loss is computed from the final
            norm and the output matrix without a call of the head.
    """

    place: Place
    layer: int | None
    modules: tuple[nn.Module, ...]
    is_output: bool = False


# Receives an input (B, T, In) and returns what replaces it, or None.
Visit = Callable[[MatrixInput, Tensor], Tensor | None]


def matrix_inputs(model: Transformer) -> list[MatrixInput]:
    """Return the input of every matrix product with weights, block by block and the head last.

    Raises:
        ValueError: ``model`` is prepared for inference, or has a matrix that this function does not know.
    """
    found: list[MatrixInput] = []
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        attention, mlp = block.attention, block.mlp
        if not isinstance(mlp.down_proj, nn.Linear):
            _refuse([f"blocks.{layer}.mlp"], "prepared for inference")
        if attention.features is not None:
            found.append(MatrixInput("qkv_features", layer, (attention.features.proj,)))
        before = (mlp.gate_proj, mlp.up_proj) if isinstance(mlp, GatedMlp) else (mlp.up_proj,)
        found += [
            MatrixInput("qkv", layer, (attention.q_proj, attention.k_proj, attention.v_proj)),
            MatrixInput("attention_output", layer, (attention.out_proj,)),
            MatrixInput("gate_up", layer, before),
            MatrixInput("down", layer, (mlp.down_proj,)),
        ]
    known = {module for each in found for module in each.modules} | {model.head}
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module not in known]
    _refuse(others, "matrices of another kind")
    return [*found, MatrixInput("head", None, (model.final_norm,), is_output=True)]


def _refuse(names: Sequence[str], what: str) -> None:
    if names:
        raise ValueError(
            f"the inputs of this model's matrices cannot all be replaced: {', '.join(names)} ({what}); give the model "
            "as it was loaded"
        )


class _SharedInput:
    """Calls ``visit`` once per pass, however many matrices read the input."""

    def __init__(self, where: MatrixInput, visit: Visit) -> None:
        self._where, self._visit = where, visit
        self._last: tuple[Tensor, Tensor | None] | None = None

    def before(self, module: nn.Module, inputs: tuple[Any, ...]) -> Tensor | None:
        x: Tensor = inputs[0]
        if self._last is None or self._last[0] is not x:
            self._last = (x, self._visit(self._where, x))
        replaced = self._last[1]
        if module is self._where.modules[-1]:
            self._last = None
        return replaced

    def after(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return self._visit(self._where, output)


@contextmanager
def visit_inputs(inputs: Sequence[MatrixInput], visit: Visit) -> Iterator[None]:
    """Call ``visit`` with each of ``inputs``, once in every forward pass within the block, and use what it returns.

    After the block, also after an error, the model is as before.
    """
    handles = []
    try:
        for each in inputs:
            shared = _SharedInput(each, visit)
            for module in each.modules:
                if each.is_output:
                    handles.append(module.register_forward_hook(shared.after))
                else:
                    handles.append(module.register_forward_pre_hook(shared.before))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class ActivationMoments:
    """Moments of all values of an activation, summed in float64 over any number of passes."""

    n: int = 0
    largest: float = 0.0
    # Sums of x, x², x³ and x⁴.
    _sums: list[float] = field(default_factory=lambda: [0.0] * 4)

    def add(self, x: Tensor) -> None:
        """Count the values of a tensor of any shape and dtype."""
        if not x.numel():
            return
        # MPS has no float64.
        wide = (x.cpu() if x.device.type == "mps" else x).double().flatten()
        squares = wide * wide
        sums = torch.stack((wide.sum(), squares.sum(), wide.dot(squares), squares.dot(squares), wide.abs().amax()))
        *powers, largest = sums.tolist()
        self.n += len(wide)
        self.largest = max(self.largest, largest)
        self._sums = [before + new for before, new in zip(self._sums, powers, strict=True)]

    @property
    def rms(self) -> float:
        """Root of the mean square; NaN without values."""
        return float((self._sums[1] / self.n) ** 0.5) if self.n else float("nan")

    @property
    def max_over_rms(self) -> float:
        """Largest magnitude over the root of the mean square; NaN where that is zero."""
        return self.largest / self.rms if self.n and self.rms else float("nan")

    @property
    def kurtosis(self) -> float:
        """Fourth central moment over the squared variance: 3 for a normal distribution; NaN for a constant."""
        if not self.n:
            return float("nan")
        mean, m2, m3, m4 = (total / self.n for total in self._sums)
        variance = m2 - mean**2
        # E (x - m)⁴ = E x⁴ - 4 m E x³ + 6 m² E x² - 3 m⁴
        fourth = m4 - 4 * mean * m3 + 6 * mean**2 * m2 - 3 * mean**4
        return fourth / variance**2 if variance > 0 else float("nan")

"""Rounding of activations to few bits, and the range of magnitudes that the integers stand for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from psannlm.evaluation.matrix_inputs import MatrixInput
from psannlm.models.activations import GainedActivation, PhasedSine, SineActivation
from psannlm.models.mlp import GatedMlp, Mlp
from psannlm.models.transformer import Block, Transformer

# Steps of a calibrated magnitude between zero and the largest: far finer than those of a quantized one.
_N_BINS = 16_384
# Ranges that are tried, from the largest magnitude down to a fraction of it, each a constant factor below the last, and
# as many again around the best of them.
_N_RANGES, _SMALLEST_RANGE = 100, 1 / 256


def largest_integer(bits: int) -> int:
    """Return q = 2^(bits - 1) - 1: the integers are -q to q."""
    return (1 << (bits - 1)) - 1


def fake_quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return ``x`` rounded to the multiples -q to q of ``scale``, ties to the even one; 0 where ``scale`` is 0.

    Args:
        x: of any shape; computed in float32, or float64 where ``x`` is, and returned in its dtype.
        scale: float32 or float64 of a shape that broadcasts to that of ``x``, not negative.
        bits: q is :func:`largest_integer` of it.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    q = largest_integer(bits)
    integers = (wide / torch.where(scale > 0, scale, 1.0)).round().clamp(-q, q)
    return (integers * scale).to(x.dtype)


class MagnitudeHistogram:
    """Counts of the magnitudes of an input, from zero to ``largest``, in ``_N_BINS`` equal bins."""

    def __init__(self, largest: float) -> None:
        self.largest = largest
        self._counts = torch.zeros(_N_BINS, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Count the values of a tensor of any shape and dtype, none above ``largest`` in magnitude."""
        if self.largest > 0:
            bins = (x.detach().abs().double().cpu().flatten() * (_N_BINS / self.largest)).long().clamp(max=_N_BINS - 1)
            self._counts += torch.bincount(bins, minlength=_N_BINS)

    def least_error_range(self, bits: int) -> float:
        """Return the magnitude that the largest integer should stand for: of those tried, that of least squared error.

        The values of a bin count as its middle; zero where all values are.
        """
        middles = (torch.arange(_N_BINS, dtype=torch.float64) + 0.5) * (self.largest / _N_BINS)
        counted = self._counts > 0
        middles, counts = middles[counted], self._counts[counted]

        def error(tried: float) -> float:
            scale = torch.tensor(tried / largest_integer(bits), dtype=torch.float64)
            return float((counts * (fake_quantize(middles, scale, bits) - middles).square()).sum())

        step = _SMALLEST_RANGE ** (1 / _N_RANGES)
        coarse: float = min((self.largest * step**number for number in range(_N_RANGES + 1)), key=error)
        around = (coarse * step ** (2 * number / _N_RANGES - 1) for number in range(_N_RANGES + 1))
        finest: float = min((coarse, *(tried for tried in around if tried <= self.largest)), key=error)
        return finest


def known_range(mlp: Mlp | GatedMlp) -> float | None:
    """Return a bound of the magnitude of the down projection's input that holds for any text; None without one.

    Known for ungated sines (max A, times 1 + abs(sin p) with a phase p inside the activation; the decay only shrinks
    them), tanh and sigmoid, times the largest gain of the output where there are gains.
    """
    if isinstance(mlp, GatedMlp):
        return None
    activation: nn.Module = mlp.activation
    bound, gains = torch.ones(()), torch.ones(())
    if isinstance(activation, GainedActivation):
        gains, activation = activation.value_of("output_gain").detach(), activation.activation
    if isinstance(activation, SineActivation):
        bound = activation.value_of("amplitude").detach()
        if isinstance(activation, PhasedSine) and activation.has_phase:
            bound = bound * (1 + torch.sin(activation.value_of("phase").detach()).abs())
    elif not isinstance(activation, nn.Tanh | nn.Sigmoid):
        return None
    return float((bound * gains.to(bound.device)).max())


def known_ranges(model: Transformer, chosen: Sequence[MatrixInput]) -> dict[MatrixInput, float]:
    """Return the known bounds of the chosen inputs of down projections: of all layers, or none."""
    found: dict[MatrixInput, float] = {}
    for each in chosen:
        if each.place == "down" and each.layer is not None:
            block = model.blocks[each.layer]
            assert isinstance(block, Block)
            bound = known_range(block.mlp)
            if bound is None:
                return {}
            found[each] = bound
    return found

"""Loss with the inputs of matrix products rounded to few bits: fake quantization, static and dynamic.

Fake quantization as in Jacob et al. 2018 (arXiv 1712.05877): an input is replaced by integer · scale, computed in
floating point, so that the loss is that of an integer product with unquantized weights. The integers are symmetric,
without a zero point, and rounding is to the nearest, ties to even. Three ways to choose the scale:

- ``static``: one scale per tensor (place and layer), from the largest magnitude on calibration windows that are not
  scored. Larger values are clipped.
- ``dynamic``: one scale per token, from the largest magnitude of its vector.
- ``static_known_range``: as ``static``, but the input of the down projection of an ungated, bounded activation gets its
  scale from the bound that follows from the parameters, without calibration: max A for the sine A sin(f z).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Literal, cast

import torch
from torch import Tensor, nn

from psannlm.config.constants import IGNORE_INDEX
from psannlm.data.windows import Windows
from psannlm.errors import ConfigError, CorpusError
from psannlm.evaluation.loss import Evaluation
from psannlm.evaluation.matrix_inputs import PLACES, ActivationMoments, MatrixInput, Place, matrix_inputs, visit_inputs
from psannlm.models.activations import GainedActivation, PhasedSine, SineActivation
from psannlm.models.mlp import GatedMlp, Mlp
from psannlm.models.transformer import Block, Transformer
from psannlm.runtime.device import Precision
from psannlm.runtime.progress import OnProgress, ProgressCounter, ignore_progress

ScaleKind = Literal["static", "static_known_range", "dynamic"]
BITS = (2, 16)
CALIBRATION_TOKENS = 16_384
# Without a number given, at most this fraction of the windows is taken for calibration.
_CALIBRATION_FRACTION = 0.25


@dataclass(frozen=True)
class QuantizationSettings:
    """What to quantize.

    Attributes:
        bits: numbers of bits, each evaluated in every way.
        places: whose inputs are quantized; None: every place of the model.
        calibration_tokens: tokens at the beginning of the text that determine the static scales, rounded up to whole
            windows; None: ``CALIBRATION_TOKENS``, at most a quarter of the text.

    Raises:
        ConfigError: no bits, bits out of range, an unknown place, or no calibration tokens.
    """

    bits: tuple[int, ...]
    places: tuple[Place, ...] | None = None
    calibration_tokens: int | None = None

    def __post_init__(self) -> None:
        low, high = BITS
        wrong = [bits for bits in self.bits if not low <= bits <= high]
        if wrong or not self.bits:
            raise ConfigError(f"activations of {wrong[0] if wrong else 'no'} bits; give numbers from {low} to {high}")
        unknown = [place for place in self.places or PLACES if place not in PLACES]
        if unknown or self.places == ():
            raise ConfigError(f"no matrix has the input {unknown[0] if unknown else ''!r}; name {', '.join(PLACES)}")
        if self.calibration_tokens is not None and self.calibration_tokens < 1:
            raise ConfigError(f"{self.calibration_tokens} calibration tokens give no scale; give 1 or more")

    @classmethod
    def parse(
        cls, bits: Sequence[str], places: Sequence[str] | None, calibration_tokens: int | None = None
    ) -> QuantizationSettings:
        """Return the settings of comma lists, such as ["8,6", "4"] for bits; what is repeated counts once.

        Raises:
            ConfigError: bits that are not numbers, and as above.
        """
        numbers = _items(bits)
        for number in numbers:
            if not (number.isascii() and number.isdecimal()):
                raise ConfigError(f"activations of {number!r} bits; give numbers from {BITS[0]} to {BITS[1]}")
        named = None if places is None else tuple(cast(Place, place) for place in _items(places))
        return cls(tuple(map(int, numbers)), named, calibration_tokens)


def _items(lists: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(item.strip() for text in lists for item in text.split(",")))


@dataclass(frozen=True)
class QuantizedLoss:
    """Loss in nats per token, its ``difference`` to the unquantized one on the same tokens, and bits per byte."""

    bits: int
    scale: ScaleKind
    loss: float
    difference: float
    bits_per_byte: float


@dataclass(frozen=True)
class LayerActivations:
    """Unquantized input of a place in one layer (None: the head), over the scored tokens.

    Attributes:
        kurtosis: fourth central moment over the squared variance, over all values; 3 for a normal distribution.
        max: largest magnitude. rms: root of the mean square. max_over_rms: their ratio.
        calibrated_max: largest magnitude on the calibration windows, which ``static`` maps to the largest integer.
        known_max: the bound that ``static_known_range`` maps to it; None where nothing is known.
    """

    layer: int | None
    kurtosis: float
    max_over_rms: float
    max: float
    rms: float
    calibrated_max: float
    known_max: float | None


@dataclass(frozen=True)
class PlaceActivations:
    """Mean and maximum over the layers of a place, whether it was quantized, and every layer."""

    place: Place
    is_quantized: bool
    kurtosis: float
    largest_kurtosis: float
    max_over_rms: float
    largest_max_over_rms: float
    layers: list[LayerActivations]


@dataclass(frozen=True)
class ActivationQuantization:
    """Unquantized and quantized losses on the scored tokens, and the activations of every place."""

    calibration_tokens: int
    tokens: int
    loss: float
    bits_per_byte: float
    losses: list[QuantizedLoss]
    places: list[PlaceActivations]


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


def token_scales(x: Tensor, bits: int) -> Tensor:
    """Return the scale (..., 1) of each vector of ``x`` (..., In): its largest magnitude over q."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.abs().amax(-1, keepdim=True) / largest_integer(bits)


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


@torch.no_grad()
def evaluate_quantized(
    model: Transformer,
    windows: Windows,
    settings: QuantizationSettings,
    *,
    precision: Precision,
    batch_size: int = 16,
    on_progress: OnProgress = ignore_progress,
) -> ActivationQuantization:
    """Return the losses of ``model`` with quantized activations over the windows that follow the calibration windows.

    Weights, biases and everything between the products keep their precision. Bits per byte use the tokens per byte of
    the whole text. ``model`` is unchanged afterwards, also after an error, and keeps its mode.

    Raises:
        ConfigError: the model lacks a place of ``settings``.
        CorpusError: the text has too few windows for both calibration and scoring.
        ValueError: as ``matrix_inputs``, or a pass computes a product without a call of its module.
    """
    inputs = matrix_inputs(model)
    chosen = _chosen(inputs, settings.places)
    n_first = _n_calibration_windows(windows, settings.calibration_tokens)
    known = _known_ranges(model, chosen)
    kinds: list[ScaleKind] = ["static", *(["static_known_range"] if known else []), "dynamic"]  # type: ignore[list-item]
    n_runs = 1 + len(settings.bits) * len(kinds)
    n_passes = n_first + n_runs * (len(windows) - n_first)
    count = ProgressCounter(on_progress, "evaluating quantized activations", "windows", n_passes)
    runs = _Runs(model, windows, precision, batch_size, count)
    was_training = model.training
    model.eval()
    try:
        calibration = {each: ActivationMoments() for each in inputs}
        n_calibration, _ = runs.observed(range(n_first), inputs, calibration)
        _require_all(calibration, n_calibration)
        scored = range(n_first, len(windows))
        moments = {each: ActivationMoments() for each in inputs}
        tokens, nats = runs.observed(scored, inputs, moments)
        if not tokens:
            raise CorpusError("the windows after the calibration windows hold no token to score; add text")
        maxima = {each: calibration[each].largest for each in chosen}
        unquantized = _as_evaluation(nats, tokens, windows)
        losses = []
        for bits in settings.bits:
            for kind in kinds:
                ranges = None if kind == "dynamic" else {**maxima, **(known if kind != "static" else {})}
                with visit_inputs(chosen, partial(_quantized, ranges, bits)):
                    _, quantized_nats = runs.loss(scored)
                found = _as_evaluation(quantized_nats, tokens, windows)
                difference = found.loss - unquantized.loss
                losses.append(QuantizedLoss(bits, kind, found.loss, difference, found.bits_per_byte))
    finally:
        model.train(was_training)
    places = _by_place(inputs, chosen, moments, calibration, known)
    return ActivationQuantization(n_calibration, tokens, unquantized.loss, unquantized.bits_per_byte, losses, places)


def _chosen(inputs: Sequence[MatrixInput], places: Sequence[Place] | None) -> list[MatrixInput]:
    present = list(dict.fromkeys(each.place for each in inputs))
    absent = [place for place in places or () if place not in present]
    if absent:
        raise ConfigError(f"the model has no matrix with the input {absent[0]}; name {', '.join(present)}")
    return [each for each in inputs if places is None or each.place in places]


def _n_calibration_windows(windows: Windows, tokens: int | None) -> int:
    n_windows = -(-(tokens or CALIBRATION_TOKENS) // windows.seq_len)
    if tokens is None:
        n_windows = max(1, min(n_windows, int(len(windows) * _CALIBRATION_FRACTION)))
    if n_windows >= len(windows):
        raise CorpusError(
            f"the static scales take {n_windows:,} windows of {windows.seq_len:,} tokens, and the text has "
            f"{len(windows):,}, so that none is left to score; take fewer calibration tokens, a shorter window or more "
            "text"
        )
    return n_windows


def _require_all(moments: dict[MatrixInput, ActivationMoments], n_labels: int) -> None:
    """Raise an error where a pass over ``n_labels`` tokens did not reach every input."""
    if not n_labels:
        raise CorpusError("the calibration windows hold no token; take more calibration tokens or a longer window")
    missed = [each for each in moments if not moments[each].n]
    if missed:
        where = missed[0].place if missed[0].layer is None else f"{missed[0].place} of layer {missed[0].layer}"
        raise ValueError(
            f"the model computes {len(missed)} products without a call of their modules, first {where}, so that their "
            "inputs cannot be quantized; give the model as it was loaded, without compiled or replaced parts"
        )


def _known_ranges(model: Transformer, chosen: Sequence[MatrixInput]) -> dict[MatrixInput, float]:
    """Return the known bounds of inputs of down projections: of all layers, or none."""
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


def _quantized(ranges: dict[MatrixInput, float] | None, bits: int, where: MatrixInput, x: Tensor) -> Tensor:
    if ranges is None:
        return fake_quantize(x, token_scales(x, bits), bits)
    scale = torch.tensor(ranges[where] / largest_integer(bits), dtype=torch.float32, device=x.device)
    return fake_quantize(x, scale, bits)


@dataclass(frozen=True)
class _Runs:
    """Passes of a model over ranges of windows."""

    model: Transformer
    windows: Windows
    precision: Precision
    batch_size: int
    count: ProgressCounter

    def loss(self, rows: range, on_labels: Callable[[Tensor], None] | None = None) -> tuple[int, float]:
        """Return the number of labels and their summed cross-entropy; ``on_labels`` gets those of each pass before."""
        n_labels, nats, device = 0, 0.0, self.precision.device
        for start in range(rows.start, rows.stop, self.batch_size):
            batch = range(start, min(start + self.batch_size, rows.stop))
            input_ids, labels = self.windows.batch(batch)
            positions = self.windows.document_positions(batch)
            labels = labels.to(device)
            if on_labels is not None:
                on_labels(labels)
            with self.precision.autocast():
                total = self.model(
                    input_ids.to(device),
                    labels,
                    document_positions=None if positions is None else positions.to(device),
                )
            nats += float(total)
            n_labels += int((labels != IGNORE_INDEX).sum())
            self.count.add(len(batch))
        return n_labels, nats

    def observed(
        self, rows: range, inputs: Sequence[MatrixInput], moments: dict[MatrixInput, ActivationMoments]
    ) -> tuple[int, float]:
        """Return the same, and add the inputs at positions with a label to ``moments``: padding does not count."""
        is_counted: list[Tensor] = []

        def remember(labels: Tensor) -> None:
            is_counted[:] = [labels != IGNORE_INDEX]

        def observe(where: MatrixInput, x: Tensor) -> None:
            moments[where].add(x[is_counted[0]])

        with visit_inputs(inputs, observe):
            return self.loss(rows, remember)


def _as_evaluation(nats: float, tokens: int, windows: Windows) -> Evaluation:
    return Evaluation(nats, tokens, max(1, round(windows.store.n_bytes * tokens / windows.n_labels)))


def _by_place(
    inputs: Sequence[MatrixInput],
    chosen: Sequence[MatrixInput],
    moments: dict[MatrixInput, ActivationMoments],
    calibration: dict[MatrixInput, ActivationMoments],
    known: dict[MatrixInput, float],
) -> list[PlaceActivations]:
    found = []
    for place in dict.fromkeys(each.place for each in inputs):
        here = [each for each in inputs if each.place == place]
        layers = [
            LayerActivations(
                each.layer,
                moments[each].kurtosis,
                moments[each].max_over_rms,
                moments[each].largest,
                moments[each].rms,
                calibration[each].largest,
                known.get(each),
            )
            for each in here
        ]
        kurtoses, ratios = [each.kurtosis for each in layers], [each.max_over_rms for each in layers]
        is_quantized = here[0] in chosen
        found.append(
            PlaceActivations(place, is_quantized, fmean(kurtoses), max(kurtoses), fmean(ratios), max(ratios), layers)
        )
    return found

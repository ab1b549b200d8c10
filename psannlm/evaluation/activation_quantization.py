"""Loss with the inputs of matrix products rounded to few bits: fake quantization, static and dynamic.

Fake quantization as in Jacob et al. 2018 (arXiv 1712.05877): an input is replaced by integer · scale, computed in
floating point, so that the loss is that of an integer product with unquantized weights. The integers are symmetric,
without a zero point, and rounding is to the nearest, ties to even. Four ways to choose the scale:

- ``static``: one scale per tensor (place and layer), from the largest magnitude on calibration windows that are not
  scored. Larger values are clipped.
- ``static_least_error``: one scale per tensor, that of the least squared error on the calibration windows: what it
  costs to clip a few large values is weighed against a finer scale for the others (Choukroun et al. 2019, arXiv
  1902.06822).
- ``dynamic``: one scale per token, from the largest magnitude of its vector.
- ``static_known_range``: as ``static``, but the input of the down projection of an ungated, bounded activation gets its
  scale from the bound that follows from the parameters, without calibration: max A for the sine A sin(f z).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Literal, cast

import torch
from torch import Tensor

from psannlm.config.constants import ACTIVATION_BITS, IGNORE_INDEX
from psannlm.data.windows import Windows
from psannlm.errors import ConfigError, CorpusError
from psannlm.evaluation.activation_ranges import MagnitudeHistogram, fake_quantize, known_ranges, largest_integer
from psannlm.evaluation.loss import Evaluation
from psannlm.evaluation.matrix_inputs import PLACES, ActivationMoments, MatrixInput, Place, matrix_inputs, visit_inputs
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import Precision
from psannlm.runtime.progress import OnProgress, ProgressCounter, ignore_progress

ScaleKind = Literal["static", "static_least_error", "static_known_range", "dynamic"]
CALIBRATION_TOKENS = 16_384
# Without a number given, at most this fraction of the windows is taken for calibration.
_CALIBRATION_FRACTION = 0.25


@dataclass(frozen=True)
class QuantizationSettings:
    """What to quantize.

    Attributes:
        bits: numbers of bits, each evaluated in every way.
        places: whose inputs are quantized; None: every place of the model.
        calibration_tokens: tokens, spread over the text, that determine the static scales, rounded up to whole windows;
            None: ``CALIBRATION_TOKENS``, at most a quarter of the text.

    Raises:
        ConfigError: no bits, bits out of range, an unknown place, or no calibration tokens.
    """

    bits: tuple[int, ...]
    places: tuple[Place, ...] | None = None
    calibration_tokens: int | None = None

    def __post_init__(self) -> None:
        low, high = ACTIVATION_BITS
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
        numbers, (low, high) = _items(bits), ACTIVATION_BITS
        for number in numbers:
            if not (number.isascii() and number.isdecimal()):
                raise ConfigError(f"activations of {number!r} bits; give numbers from {low} to {high}")
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
        least_error_max: for each number of bits, as text, the magnitude that ``static_least_error`` maps to it; empty
            where the place is not quantized.
    """

    layer: int | None
    kurtosis: float
    max_over_rms: float
    max: float
    rms: float
    calibrated_max: float
    known_max: float | None
    least_error_max: dict[str, float]


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


def token_scales(x: Tensor, bits: int) -> Tensor:
    """Return the scale (..., 1) of each vector of ``x`` (..., In): its largest magnitude over q."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.abs().amax(-1, keepdim=True) / largest_integer(bits)


@torch.no_grad()
def evaluate_quantized(
    model: Transformer,
    windows: Windows,
    settings: QuantizationSettings,
    *,
    precision: Precision,
    calibration: Windows | None = None,
    batch_size: int = 16,
    on_progress: OnProgress = ignore_progress,
) -> ActivationQuantization:
    """Return the losses of ``model`` with quantized activations.

    Static scales are calibrated on windows at equal distances in ``calibration``, and all ``windows`` are scored;
    without it they are calibrated on some of ``windows``, and the others are scored.

    Weights, biases and everything between the products keep their precision. Bits per byte use the tokens per byte of
    the whole text. ``model`` is unchanged afterwards, also after an error, and keeps its mode.

    Raises:
        ConfigError: the model lacks a place of ``settings``.
        CorpusError: the text has too few windows for both calibration and scoring.
        ValueError: as ``matrix_inputs``, or a pass computes a product without a call of its module.
    """
    inputs = matrix_inputs(model)
    chosen = _chosen(inputs, settings.places)
    calibrating, scored = _split(windows, calibration, settings.calibration_tokens)
    known = known_ranges(model, chosen)
    kinds: list[ScaleKind] = ["static", "static_least_error", "dynamic"]
    if known:
        kinds.insert(2, "static_known_range")
    n_runs = 1 + len(settings.bits) * len(kinds)
    n_passes = 2 * len(calibrating) + n_runs * len(scored)
    count = ProgressCounter(on_progress, "evaluating quantized activations", "windows", n_passes)
    runs = _Runs(model, windows, precision, batch_size, count)
    calibration_runs = runs if calibration is None else replace(runs, windows=calibration)
    was_training = model.training
    model.eval()
    try:
        seen = {each: ActivationMoments() for each in inputs}
        n_calibration, _ = calibration_runs.observed(calibrating, seen)
        _require_all(seen, n_calibration)
        histograms = {each: MagnitudeHistogram(seen[each].largest) for each in chosen}
        calibration_runs.observed(calibrating, histograms)
        least_error = {
            each: {bits: histogram.least_error_range(bits) for bits in settings.bits}
            for each, histogram in histograms.items()
        }
        moments = {each: ActivationMoments() for each in inputs}
        tokens, nats = runs.observed(scored, moments)
        if not tokens:
            raise CorpusError("the windows besides those for calibration hold no token to score; add text")
        maxima = {each: seen[each].largest for each in chosen}
        unquantized = _as_evaluation(nats, tokens, windows)
        losses = []
        for bits in settings.bits:
            static: dict[ScaleKind, dict[MatrixInput, float]] = {
                "static": maxima,
                "static_least_error": {each: ranges[bits] for each, ranges in least_error.items()},
                "static_known_range": {**maxima, **known},
            }
            for kind in kinds:
                ranges = static.get(kind)
                with visit_inputs(chosen, partial(_quantized, ranges, bits)):
                    _, quantized_nats = runs.loss(scored)
                found = _as_evaluation(quantized_nats, tokens, windows)
                difference = found.loss - unquantized.loss
                losses.append(QuantizedLoss(bits, kind, found.loss, difference, found.bits_per_byte))
    finally:
        model.train(was_training)
    places = _by_place(moments, seen, known, least_error)
    return ActivationQuantization(n_calibration, tokens, unquantized.loss, unquantized.bits_per_byte, losses, places)


def _chosen(inputs: Sequence[MatrixInput], places: Sequence[Place] | None) -> list[MatrixInput]:
    present = list(dict.fromkeys(each.place for each in inputs))
    absent = [place for place in places or () if place not in present]
    if absent:
        raise ConfigError(f"the model has no matrix with the input {absent[0]}; name {', '.join(present)}")
    return [each for each in inputs if places is None or each.place in places]


def _split(
    windows: Windows, calibration: Windows | None, calibration_tokens: int | None
) -> tuple[Sequence[int], Sequence[int]]:
    """Return the numbers of the windows for calibration, at equal distances, and of those to score."""
    source = windows if calibration is None else calibration
    n = _n_calibration_windows(source, calibration_tokens, keeps_some=calibration is None)
    calibrating = [at * len(source) // n for at in range(n)]
    if calibration is not None:
        return calibrating, range(len(windows))
    return calibrating, sorted(set(range(len(windows))) - set(calibrating))


def _n_calibration_windows(windows: Windows, tokens: int | None, *, keeps_some: bool) -> int:
    n_windows = -(-(tokens or CALIBRATION_TOKENS) // windows.seq_len)
    if not keeps_some:
        return min(n_windows, len(windows))
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


def _quantized(ranges: dict[MatrixInput, float] | None, bits: int, where: MatrixInput, x: Tensor) -> Tensor:
    if ranges is None:
        return fake_quantize(x, token_scales(x, bits), bits)
    scale = torch.tensor(ranges[where] / largest_integer(bits), dtype=torch.float32, device=x.device)
    return fake_quantize(x, scale, bits)


@dataclass(frozen=True)
class _Runs:
    """Passes of a model over some of the windows."""

    model: Transformer
    windows: Windows
    precision: Precision
    batch_size: int
    count: ProgressCounter

    def loss(self, rows: Sequence[int], on_labels: Callable[[Tensor], None] | None = None) -> tuple[int, float]:
        """Return the number of labels and their summed cross-entropy; ``on_labels`` gets those of each pass before."""
        n_labels, nats, device = 0, 0.0, self.precision.device
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
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
        self, rows: Sequence[int], found: Mapping[MatrixInput, ActivationMoments | MagnitudeHistogram]
    ) -> tuple[int, float]:
        """Return the same, and add the inputs at positions with a label to ``found``: padding does not count."""
        is_counted: list[Tensor] = []

        def remember(labels: Tensor) -> None:
            is_counted[:] = [labels != IGNORE_INDEX]

        def observe(where: MatrixInput, x: Tensor) -> None:
            found[where].add(x[is_counted[0]])

        with visit_inputs(list(found), observe):
            return self.loss(rows, remember)


def _as_evaluation(nats: float, tokens: int, windows: Windows) -> Evaluation:
    return Evaluation(nats, tokens, max(1, round(windows.store.n_bytes * tokens / windows.n_labels)))


def _by_place(
    moments: dict[MatrixInput, ActivationMoments],
    calibration: dict[MatrixInput, ActivationMoments],
    known: dict[MatrixInput, float],
    least_error: dict[MatrixInput, dict[int, float]],
) -> list[PlaceActivations]:
    found = []
    for place in dict.fromkeys(each.place for each in moments):
        here = [each for each in moments if each.place == place]
        layers = [
            LayerActivations(
                layer=each.layer,
                kurtosis=moments[each].kurtosis,
                max_over_rms=moments[each].max_over_rms,
                max=moments[each].largest,
                rms=moments[each].rms,
                calibrated_max=calibration[each].largest,
                known_max=known.get(each),
                least_error_max={str(bits): largest for bits, largest in least_error.get(each, {}).items()},
            )
            for each in here
        ]
        kurtoses, ratios = [each.kurtosis for each in layers], [each.max_over_rms for each in layers]
        is_quantized = here[0] in least_error
        found.append(
            PlaceActivations(place, is_quantized, fmean(kurtoses), max(kurtoses), fmean(ratios), max(ratios), layers)
        )
    return found

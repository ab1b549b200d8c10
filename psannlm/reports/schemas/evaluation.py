"""Schema of an evaluation (``reports/eval/<ts>/metrics.json``)."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from psannlm.io.artifact_schema import Figure, Figures, Flag, OptionalFigure, Whole
from psannlm.reports.schemas.measured import BootstrapDifference


@dataclass(frozen=True, kw_only=True)
class DocumentComparison(BootstrapDifference):
    """Difference to another model, ``checkpoint`` with ``loss``, on the same documents."""

    checkpoint: str
    loss: Figure


@dataclass(frozen=True, kw_only=True)
class QuantizedLossFigures(Figures):
    """One of ``evaluation.activation_quantization.QuantizedLoss``."""

    bits: Whole
    scale: str
    loss: OptionalFigure
    difference: OptionalFigure
    bits_per_byte: OptionalFigure


@dataclass(frozen=True, kw_only=True)
class LayerActivationFigures(Figures):
    """One of ``evaluation.activation_quantization.LayerActivations``; the layer of the head is null."""

    layer: Whole | None
    kurtosis: OptionalFigure
    max_over_rms: OptionalFigure
    max: OptionalFigure
    rms: OptionalFigure
    calibrated_max: OptionalFigure
    known_max: OptionalFigure
    least_error_max: dict[str, OptionalFigure] | None = None


@dataclass(frozen=True, kw_only=True)
class PlaceActivationFigures(Figures):
    """One of ``evaluation.activation_quantization.PlaceActivations``."""

    place: str
    is_quantized: Flag
    kurtosis: OptionalFigure
    largest_kurtosis: OptionalFigure
    max_over_rms: OptionalFigure
    largest_max_over_rms: OptionalFigure
    layers: list[LayerActivationFigures]


@dataclass(frozen=True, kw_only=True)
class ActivationFigures(Figures):
    """Figures of ``evaluation.activation_quantization.ActivationQuantization``."""

    calibration_tokens: Whole
    tokens: Whole
    loss: OptionalFigure
    bits_per_byte: OptionalFigure
    losses: list[QuantizedLossFigures]
    places: list[PlaceActivationFigures]


@dataclass(frozen=True, kw_only=True)
class EvaluationMetrics(Figures):
    """Model, text, and the figures of ``evaluation.loss.Evaluation``; the loss is in nats per token."""

    checkpoint: str
    dtype: str = "float32"
    files: list[str]
    corpus_sha256: str
    loss: OptionalFigure
    perplexity: OptionalFigure
    bits_per_byte: OptionalFigure
    tokens: Whole
    bytes: Whole
    lossy_tokenizer: Flag | None = None
    comparison: DocumentComparison | None = None
    activations: ActivationFigures | None = None

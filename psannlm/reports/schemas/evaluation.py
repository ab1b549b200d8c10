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

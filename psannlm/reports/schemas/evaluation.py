"""Schema of an evaluation (``reports/eval/<ts>/metrics.json``)."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from psannlm.io.artifact_schema import Figures, Flag, OptionalFigure, Whole


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

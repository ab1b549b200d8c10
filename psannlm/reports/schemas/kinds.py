"""The schema of each kind of artifact folder."""

from __future__ import annotations

from typing import Any

from psannlm.data.record_figures import PrepRecord, TokenizerCard
from psannlm.io.artifact_schema import Figures, read_figures
from psannlm.io.readers import Unreadable
from psannlm.reports.schemas.decoding import DecodingMetrics
from psannlm.reports.schemas.evaluation import EvaluationMetrics
from psannlm.reports.schemas.gpu import SuiteReport
from psannlm.reports.schemas.serving import ServingMetrics
from psannlm.reports.schemas.study import StudyMetrics
from psannlm.reports.schemas.throughput import ThroughputMetrics
from psannlm.reports.schemas.tokenizers import TokenizerReport

# With what the figures are, in errors.
SCHEMAS: dict[str, tuple[type[Figures], str]] = {
    "ablations": (StudyMetrics, "a study"),
    "eval": (EvaluationMetrics, "an evaluation"),
    "gpu": (SuiteReport, "a GPU validation"),
    "kv_cache": (DecodingMetrics, "a decoding benchmark"),
    "prep": (PrepRecord, "a corpus preparation"),
    "serving": (ServingMetrics, "a serving benchmark"),
    "throughput": (ThroughputMetrics, "a training benchmark"),
    "tokenize": (TokenizerCard, "a fitted tokenizer"),
    "tokenizers": (TokenizerReport, "a tokenizer benchmark"),
}


def read_artifact_figures(kind: str, figures: dict[str, Any]) -> Figures | None:
    """Return the figures of an artifact of ``kind`` by its schema; None for a kind without one.

    Raises:
        Unreadable: they are not figures of this kind.
    """
    if kind not in SCHEMAS:
        return None
    schema, name = SCHEMAS[kind]
    try:
        return read_figures(schema, figures)
    except Unreadable as error:
        raise Unreadable(f"not the figures of {name}: {error}") from error

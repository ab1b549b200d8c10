"""Schema of the training runs of a report (``reports/benchmarks/<ts>/metrics.json``)."""

from __future__ import annotations

from typing import Any

from pydantic.dataclasses import dataclass

from psannlm.io.artifact_schema import Figures, Flag, OptionalFigure, Whole


@dataclass(frozen=True, kw_only=True)
class RunRow(Figures):
    """The figures of a run; None where they are unknown. Losses are in nats per token.

    ``ema_val_loss`` is that of the averaged weights (``train.ema``) at the last validation.
    Settings (``base``, ``mlp``, ``seed``, ``lr``, ``batch_tokens``) are as the run's configuration has them.
    """

    timestamp: str | None
    run: str
    base: Any
    mlp: Any
    parameters: Whole | None
    corpus: str
    corpus_sha256: str | None
    seed: Any
    lr: Any
    batch_tokens: Any
    step: Whole | None
    tokens: Whole | None
    train_loss: OptionalFigure
    val_loss: OptionalFigure
    val_step: Whole | None
    perplexity: OptionalFigure
    bits_per_byte: OptionalFigure
    lossy_tokenizer: Flag | None
    final_val_loss: OptionalFigure
    tokens_per_s: OptionalFigure
    tokens_per_s_lowest: OptionalFigure
    tokens_per_s_highest: OptionalFigure
    peak_memory_bytes: Whole | None
    epochs: OptionalFigure
    val_overlap: OptionalFigure
    folder: str
    ema_val_loss: OptionalFigure = None


@dataclass(frozen=True, kw_only=True)
class ReportedRun(RunRow):
    """A run of a report with all of its settings by dotted key."""

    settings: dict[str, Any]


@dataclass(frozen=True)
class ReportMetrics(Figures):
    """The whole file."""

    runs: list[ReportedRun]

"""Schema of a training benchmark (``reports/throughput/<ts>/metrics.json``)."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any

from pydantic import AliasChoices, Field, computed_field
from pydantic.dataclasses import dataclass

from psannlm.io.artifact_schema import Figure, Figures, Flag, OptionalFigure, Whole
from psannlm.reports.schemas.measured import Spread


@dataclass(frozen=True, kw_only=True)
class ThroughputRow(Figures):
    """One candidate of a training benchmark. Times are in seconds, losses in nats per token."""

    timestamp: str
    name: str
    maker: str
    description: str
    base: str
    mlp: str
    activation: str = ""
    is_baseline: Annotated[Flag, Field(validation_alias=AliasChoices("is_baseline", "is_yardstick"))] = False
    positional_encoding: str
    d_model: Whole
    n_layers: Whole
    n_heads: Whole
    vocab_size: Whole
    parameters: Whole
    seq_len: Whole
    batch_tokens: Whole
    amp: str
    precision: str
    optimizer: str
    compile: Flag
    grad_checkpoint: Flag
    device: str
    threads: Whole
    tokens_per_s: OptionalFigure
    tokens_per_s_lowest: OptionalFigure
    tokens_per_s_highest: OptionalFigure
    step_s: OptionalFigure
    first_step_s: OptionalFigure
    flops_per_token: Whole
    utilisation: OptionalFigure
    peak_bytes: Whole | None
    ours_over_it: Spread
    our_memory_over_its: OptionalFigure
    first_loss: OptionalFigure
    last_loss: OptionalFigure
    losses: list[Figure]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def is_yardstick(self) -> bool:
        """The former name of ``is_baseline``, for those who read it."""
        return self.is_baseline


@dataclass(frozen=True, kw_only=True)
class ThroughputMetrics(Figures):
    """The whole file: settings, machine, a row for each candidate, and the reasons to distrust them."""

    model: dict[str, Any]
    seq_len: Whole
    batch_tokens: Whole
    amp: str
    is_compiled: Flag
    grad_checkpoint: Flag
    optimizer: str
    steps: Whole | None
    repeats: Whole
    warmup: Whole
    seed: Whole
    also: list[str]
    against: str | None
    tokens_per_step: Whole
    device: str
    threads: Whole
    precision: str
    steps_per_turn: Whole
    matrix_flops_per_s: Spread
    rows: list[ThroughputRow]
    sine_cost: dict[str, Spread | None]
    problems: list[str] = field(default_factory=list)
    clock: str = "wall"

"""Schema of a decoding benchmark (``reports/kv_cache/<ts>/metrics.json``), finished or interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AliasChoices, Field, computed_field
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from psannlm.io.artifact_schema import Figure, Figures, Flag, OptionalFigure, Whole, absent_if_none
from psannlm.reports.schemas.measured import Spread


@dataclass(frozen=True, kw_only=True)
class DecodeFigures(Figures):
    """Times in seconds and throughputs of decoding; the former are of all rows, as in ``modes.DecodeRun``."""

    prefill_s: Spread
    first_token_s: Spread
    decode_s: Spread
    total_s: Spread
    decode_tokens_per_s: Spread
    tokens_per_s: Spread


@dataclass(frozen=True, kw_only=True)
class CaseFigures(DecodeFigures):
    """A way of decoding: name and switches, numbers of runs and of timed passes; ``is_warm_up`` while interrupted."""

    name: str
    cache: Flag
    batched: Flag
    compiled: Flag
    n_runs: Whole | None = None
    passes_timed: Whole
    is_warm_up: Flag | None = None

    _serialize = absent_if_none("is_warm_up")


@dataclass(frozen=True, kw_only=True)
class ReferenceFigures(DecodeFigures):
    """Decoding by a reference model, and our throughput over its: of all tokens, and of those after the first."""

    name: str
    description: str
    parameters: Whole
    first_s: Figure
    ours: str
    our_rate_over_its: dict[str, Spread]


@dataclass(frozen=True)
class RooflineFraction(Figures):
    """Seconds of a decoding step, and the fraction of them in which memory delivers the bytes it reads.

    ``fraction`` is ``n_bytes / bytes_per_s / step_s``: 1 is a step that only reads, at the measured bandwidth.
    """

    n_bytes: Whole
    bytes_per_s: Spread
    step_s: Spread
    fraction: Annotated[
        Spread,
        Field(validation_alias=AliasChoices("fraction_of_floor", "fraction"), serialization_alias="fraction_of_floor"),
    ]

    @property
    def roofline_s(self) -> float:
        """Seconds to read ``n_bytes`` at the median bandwidth."""
        return self.n_bytes / self.bytes_per_s.median

    @computed_field  # type: ignore[prop-decorator]
    @property
    def floor_s(self) -> float:
        """``roofline_s`` by its key in the file."""
        return self.roofline_s

    @classmethod
    def of(cls, n_bytes: int, rates: Sequence[float], steps_s: Sequence[float], **others: int) -> Self:
        """Compare steps of ``steps_s`` seconds with the bandwidth (bytes per second) measured in the same rounds.

        ``others`` are the further fields of a subclass.
        """
        fractions = [n_bytes / rate / step for rate, step in zip(rates, steps_s, strict=True)]
        return cls(n_bytes, Spread.of(rates), Spread.of(steps_s), Spread.of(fractions), **others)


@dataclass(frozen=True, kw_only=True)
class GrowthPoint(RooflineFraction):
    """A decoding step of all rows at one context length; ``cache_bytes`` is the size of the KV cache."""

    context: Whole
    cache_bytes: Whole


@dataclass(frozen=True)
class Difference(Figures):
    """A new token (from 0) at which two decoding modes differ; ``gap`` is between the logits of the two choices."""

    row: Whole
    place: Whole
    first: str
    first_token: Whole
    second: str
    second_token: Whole
    gap: Figure
    tolerance: Figure = 0.0

    @property
    def is_tie(self) -> bool:
        """Whether rounding alone explains it."""
        return self.gap <= self.tolerance

    def __str__(self) -> str:
        limit = (
            f"up to {self.tolerance:.2g} is a rounding tie"
            if self.tolerance
            else "below about 1e-5, rounding may decide: try another --seed"
        )
        return (
            f"outputs differ first at row {self.row}, new token {self.place}: {self.first_token} with {self.first}, "
            f"{self.second_token} with {self.second}; in a full forward pass their logits are {self.gap:.2g} apart "
            f"({limit})"
        )


@dataclass(frozen=True)
class Agreement(Figures):
    """Result of comparing all runs.

    Attributes:
        difference: the earliest difference that rounding does not explain, or None.
        tied_places: number of (row, position) pairs at which a mode chose another token within the tolerance.
        largest_tie: the largest gap among them; 0 without a tie.
        largest_tolerance: the largest tolerance of any row.
        n_checked: number of tokens compared, in all runs.
    """

    difference: Difference | None
    tied_places: Whole
    largest_tie: Figure
    largest_tolerance: Figure
    n_checked: Whole


@dataclass(frozen=True)
class PackingCost(Figures):
    """Perplexities on ``n_tokens`` sampled tokens; ``ratio_error`` is the standard error of their ratio."""

    n_tokens: Whole
    perplexity: Figure
    packed_perplexity: Figure
    ratio: Figure
    ratio_error: Figure


@dataclass(frozen=True)
class CacheFigures(Figures):
    """Bytes of a KV cache, measured and as ``models.accounting`` predicts them, and its capacity in tokens per row."""

    measured: Whole
    predicted: Whole
    slots: Whole


# What a finished benchmark has measured; an interrupted one and the earliest files lack some of the other keys.
_FINISHED = (
    *("batch_size", "prompt_length", "max_new_tokens", "repeats", "seed", "dtype", "is_compiled", "contexts", "device"),
    *("threads", "weights", "model", "parameters", "weight_bytes", "notices", "speedup_of_decoding", "compile_s"),
    *("cache_bytes", "bandwidth_floor", "context_growth", "contexts_left_out", "agreement", "outputs_are_equal"),
    *("distinct_tokens", "problems"),
)


@dataclass(frozen=True, kw_only=True)
class DecodingMetrics(Figures):
    """The whole file. An interrupted benchmark has the keys that it had measured; they are None here.

    Attributes:
        cached_tokens_per_s, naive_tokens_per_s, cached_over_naive: throughput of all new tokens, prefill included, of
            the cached batch and of the naive loop, and their ratio; None where one of them was not run.
        compile_s: seconds that the first run of each compiled case took beyond its median run.
        reference_model: the first of ``reference_models``, which earlier files had alone.
        interrupted_in: the run that was interrupted.
    """

    is_complete: Flag = True
    batch_size: Whole | None = None
    prompt_length: Whole | None = None
    max_new_tokens: Whole | None = None
    repeats: Whole | None = None
    seed: Whole | None = None
    dtype: str | None = None
    is_compiled: Flag | None = None
    uncached_steps: Whole | None = None
    contexts: list[Whole] | None = None
    against: str | None = None
    time_limit_s: OptionalFigure = None
    generated_tokens: Whole | None = None
    cached_tokens_per_s: Spread | None = None
    naive_tokens_per_s: Spread | None = None
    cached_over_naive: Spread | None = None
    device: str | None = None
    threads: Whole | None = None
    weights: str | None = None
    model: dict[str, Any] | None = None
    parameters: Whole | None = None
    weight_bytes: Whole | None = None
    notices: list[str] | None = None
    cases: list[CaseFigures] = Field(default_factory=list)
    speedup_of_decoding: dict[str, Spread] | None = None
    compile_s: dict[str, Figure] | None = None
    cache_bytes: dict[str, CacheFigures] | None = None
    bandwidth_floor: dict[str, RooflineFraction] | None = None
    context_growth: list[GrowthPoint] | None = None
    contexts_left_out: list[Whole] | None = None
    packing_cost: PackingCost | None = None
    reference_model: Annotated[
        ReferenceFigures | None, Field(validation_alias=AliasChoices("reference_model", "rival"))
    ] = None
    reference_models: list[ReferenceFigures] = Field(default_factory=list)
    agreement: Agreement | None = None
    outputs_are_equal: Flag | None = None
    distinct_tokens: Whole | None = None
    problems: list[str] | None = None
    interrupted_in: dict[str, Any] | None = None

    _serialize = absent_if_none(
        *_FINISHED,
        "generated_tokens",
        "cached_tokens_per_s",
        "naive_tokens_per_s",
        "cached_over_naive",
        "interrupted_in",
    )

    @computed_field(alias="rival")  # type: ignore[prop-decorator]
    @property
    def under_former_name(self) -> ReferenceFigures | None:
        """``reference_model`` once more, for those who read its former key."""
        return self.reference_model

    def __post_init__(self) -> None:
        """Refuse a finished benchmark without its figures."""
        missing = [name for name in _FINISHED if getattr(self, name) is None]
        if self.is_complete and missing:
            raise ValueError(f"{missing[0]}: field required and {len(missing) - 1} more problems")

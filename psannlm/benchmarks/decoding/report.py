"""Results of the decoding benchmark: throughput, speedups that differ in one factor, cache sizes and problems."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from psannlm.benchmarks.decoding.context_length import CONTEXTS
from psannlm.benchmarks.decoding.modes import CASES, Case, DecodeRun
from psannlm.benchmarks.harness.interleaved import paired_ratio, shared_rounds
from psannlm.benchmarks.harness.reference_models import ReferenceRuns, require_reference_model
from psannlm.config.model import ModelConfig
from psannlm.errors import ConfigError, nearest
from psannlm.generation.quantize import WeightDtype
from psannlm.models.accounting import cache_bytes
from psannlm.reports.schemas.decoding import (
    Agreement,
    CacheFigures,
    CaseFigures,
    DecodingMetrics,
    GrowthPoint,
    PackingCost,
    ReferenceFigures,
    RooflineFraction,
)
from psannlm.reports.schemas.measured import Spread

Cases = Literal["all", "batch", "cached"]
_FIGURES = ("prefill_s", "first_token_s", "decode_s", "total_s", "decode_tokens_per_s", "tokens_per_s")


@dataclass(frozen=True)
class KvSettings:
    """Settings of the decoding benchmark: ``batch_size`` prompts of ``prompt_length`` random tokens, each continued
    by ``max_new_tokens`` tokens.

    Attributes:
        dtype: dtype of the packed weights.
        is_compiled: measure cached decoding with torch.compile too.
        cases: ``all``; ``batch`` leaves out decoding row by row, ``cached`` decoding without the cache.
        uncached_steps: full forward passes that are timed after a row's first, spread evenly; None: all.
        contexts: context lengths at which a decoding step is timed.
        against: reference models of equal size that decode the same prompts, of ``REFERENCE_MODELS``.
        time_limit_s: time limit in seconds. Uncached passes, repeats and contexts beyond it are left out, and the
            report states each. None: no limit.

    Raises:
        ConfigError: a number is too small to measure anything, a name is unknown, or a package is missing.
    """

    batch_size: int = 8
    prompt_length: int = 96
    max_new_tokens: int = 64
    repeats: int = 3
    seed: int = 1337
    dtype: WeightDtype = "float32"
    is_compiled: bool = False
    cases: Cases = "all"
    uncached_steps: int | None = None
    contexts: tuple[int, ...] = CONTEXTS
    against: tuple[str, ...] = ()
    time_limit_s: float | None = None

    def __post_init__(self) -> None:
        lowest = {"batch_size": 1, "prompt_length": 1, "max_new_tokens": 2, "repeats": 1, "seed": 0}
        if self.uncached_steps is not None:
            lowest["uncached_steps"] = 2
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} {getattr(self, name)} is too small; use {least} or more")
        known = get_args(Cases)
        if self.cases not in known:
            raise ConfigError(f"cases {self.cases!r:.40} is not one of {', '.join(known)}{nearest(self.cases, known)}")
        if self.time_limit_s is not None and not self.time_limit_s > 0:
            raise ConfigError(f"time_limit_s {self.time_limit_s} is not a duration; use more than 0")
        for library in self.against:
            require_reference_model(library)
        if len(set(self.against)) < len(self.against):
            raise ConfigError("--against names a reference model twice; name it once")

    def figures(self) -> dict[str, Any]:
        """Return the settings as they are written to ``metrics.json``."""
        return {**asdict(self), "against": ", ".join(self.against) or None}

    @property
    def n_tokens(self) -> int:
        """Tokens of a row at its end."""
        return self.prompt_length + self.max_new_tokens

    @property
    def mean_context(self) -> int:
        """Mean tokens of a row over its decoding steps, from ``prompt_length + 1`` to all but the last."""
        return self.prompt_length + self.max_new_tokens // 2

    def chosen_cases(self, is_compiled: bool) -> tuple[Case, ...]:
        """Return the cases to measure; with one prompt, batched and row by row are the same."""
        chosen = [
            case
            for case in CASES
            if (case.is_batched or (self.batch_size > 1 and self.cases != "batch"))
            and (case.use_cache or self.cases != "cached")
        ]
        if is_compiled:
            chosen += [Case(True, case.is_batched, True) for case in chosen if case.use_cache]
        return tuple(chosen)


@dataclass(frozen=True)
class KvReport:
    """Results of the benchmark; ``problems`` lists each property that did not hold.

    Attributes:
        weights: ``random``, or the file of the weights.
        notices: deviations from the settings, such as runs that the time limit left out.
        first_s: seconds of the first run of each compiled case, compilation included.
        reads: measured memory bandwidth in bytes per second, by run, for reads of the size of a batch (True) or of
            one row (False).
        left_out: context lengths beyond the model's maximum.
    """

    settings: KvSettings
    model: ModelConfig
    weights: str
    device: str
    threads: int
    parameters: int
    weight_bytes: int
    cache_element_bytes: int
    runs: dict[Case, list[DecodeRun]]
    agreement: Agreement
    n_bytes: dict[bool, int]
    reads: dict[bool, list[float]]
    first_s: dict[Case, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    growth: list[GrowthPoint] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    packing: PackingCost | None = None
    reference_models: list[ReferenceRuns] = field(default_factory=list)

    def throughput(self, case: Case) -> Spread:
        """Return the decode throughput of a case in tokens per second, after the first token."""
        return Spread.of(_decode_throughputs(self.runs[case]))

    def from_cache(self, is_batched: bool) -> Spread | None:
        """Return the speedup of decoding by the cache alone: same batching, not compiled."""
        return self._ratio(Case(True, is_batched), Case(False, is_batched))

    def from_batching(self, use_cache: bool, is_compiled: bool = False) -> Spread | None:
        """Return the speedup of decoding by batching alone: same use of the cache, same engine."""
        return self._ratio(Case(use_cache, True, is_compiled), Case(use_cache, False, is_compiled))

    def from_compiling(self, is_batched: bool) -> Spread | None:
        """Return the speedup of cached decoding by compilation alone."""
        return self._ratio(Case(True, is_batched, True), Case(True, is_batched))

    def _ratio(self, above: Case, below: Case) -> Spread | None:
        """Return the ratio of decode throughputs, run by run; None if a case was not run."""
        if above not in self.runs or below not in self.runs:
            return None
        return paired_ratio(
            *shared_rounds(_decode_throughputs(self.runs[above]), _decode_throughputs(self.runs[below]))
        )

    @property
    def naive(self) -> Case | None:
        """The naive loop: one full forward pass per token, row by row; None if it was not run."""
        case = Case(False, self.settings.batch_size == 1)
        return case if case in self.runs else None

    def cached_over_naive(self) -> Spread | None:
        """Return the throughput of the cached batch over the naive loop's, of all new tokens, prefill included."""
        return None if self.naive is None else _whole_ratio(self.runs[Case(True, True)], self.runs[self.naive])

    @property
    def n_generated(self) -> int:
        """New tokens of all rows in one run."""
        return self.settings.batch_size * self.settings.max_new_tokens

    @property
    def ours(self) -> Case:
        """The case compared with a reference model: the whole batch with the cache, compiled if that was requested."""
        compiled = Case(True, True, True)
        return compiled if compiled in self.runs else Case(True, True)

    def over_reference_model(self, reference_model: ReferenceRuns) -> dict[str, Spread]:
        """Return our throughput over a reference model's, run by run: of all tokens, and of those after the first."""
        mine, theirs = self.runs[self.ours], reference_model.runs
        return {
            "whole": _whole_ratio(mine, theirs),
            "decode": paired_ratio(*shared_rounds(_decode_throughputs(mine), _decode_throughputs(theirs))),
        }

    def compile_s(self) -> dict[Case, float]:
        """Return the seconds that the first run of each compiled case took beyond its median run."""
        return {
            case: first - statistics.median([run.total_s for run in self.runs[case]])
            for case, first in self.first_s.items()
        }

    def rooflines(self) -> dict[Case, RooflineFraction]:
        """Return the mean decoding step of each cached case and the time to read its bytes, run by run."""
        found = {}
        for case, runs in self.runs.items():
            if case.use_cache:
                n_steps = (self.settings.max_new_tokens - 1) * (1 if case.is_batched else self.settings.batch_size)
                steps = [run.decode_s / n_steps for run in runs]
                rates = self.reads[case.is_batched]
                found[case] = RooflineFraction.of(self.n_bytes[case.is_batched], *shared_rounds(rates, steps))
        return found

    def measured_cache_bytes(self) -> dict[Case, int]:
        """Return the largest KV cache of each case that has one."""
        return {case: max(run.cache_bytes for run in runs) for case, runs in self.runs.items() if case.use_cache}

    def cache_slots(self) -> dict[Case, int]:
        """Return the capacity of that cache, in tokens per row."""
        return {case: max(run.cache_slots for run in runs) for case, runs in self.runs.items() if case.use_cache}

    def predicted_cache_bytes(self) -> dict[Case, int]:
        """Return the size that ``models.accounting`` predicts for a cache of that capacity."""
        return {
            case: cache_bytes(
                self.model, self.settings.batch_size if case.is_batched else 1, slots, self.cache_element_bytes
            )
            for case, slots in self.cache_slots().items()
        }

    @property
    def n_uncached_passes(self) -> int:
        """Full forward passes that were timed per row without the cache; 0 if those cases were left out."""
        return max((len(runs[0].places or ()) for runs in self.runs.values()), default=0)

    @property
    def distinct_tokens(self) -> int:
        """Number of distinct ids in the outputs; equality of few distinct ids proves little."""
        return len({token for row in self.runs[Case(True, True)][0].ids for token in row})

    @property
    def problems(self) -> list[str]:
        """Return one line for each property that did not hold: tokens that differ, an unexpected cache size."""
        found = [] if self.agreement.difference is None else [str(self.agreement.difference)]
        predictions, slots = self.predicted_cache_bytes(), self.cache_slots()
        # The last token of a row is chosen but never read.
        needed = self.settings.n_tokens - 1
        for case, measured in self.measured_cache_bytes().items():
            if measured != predictions[case]:
                message = (
                    f"{case}: the cache takes {measured:,} bytes, models.accounting predicts {predictions[case]:,}"
                )
                found.append(message)
            if slots[case] < needed:
                found.append(f"{case}: the cache holds {slots[case]:,} tokens per row, and {needed:,} are needed")
        return found

    def metrics(self) -> DecodingMetrics:
        """Return settings, figures and ratios as they are written."""
        speedups = {
            "cache_alone_in_batch": self.from_cache(True),
            "cache_alone_one_row": self.from_cache(False),
            "batching_alone_with_cache": self.from_batching(True),
            "batching_alone_with_cache_compiled": self.from_batching(True, True),
            "batching_alone_without_cache": self.from_batching(False),
            "compiling_alone_in_batch": self.from_compiling(True),
            "compiling_alone_one_row": self.from_compiling(False),
        }
        predicted, slots = self.predicted_cache_bytes(), self.cache_slots()
        return DecodingMetrics(
            **{
                **self.settings.figures(),
                "cases": [case_figures(case, runs) for case, runs in self.runs.items()],
            },
            **headline(self.settings, self.runs),
            device=self.device,
            threads=self.threads,
            weights=self.weights,
            model=self.model.model_dump(mode="json"),
            parameters=self.parameters,
            weight_bytes=self.weight_bytes,
            notices=self.notices,
            speedup_of_decoding={name: ratio for name, ratio in speedups.items() if ratio is not None},
            compile_s={str(case): seconds for case, seconds in self.compile_s().items()},
            cache_bytes={
                str(case): CacheFigures(measured, predicted[case], slots[case])
                for case, measured in self.measured_cache_bytes().items()
            },
            bandwidth_floor={str(case): roofline for case, roofline in self.rooflines().items()},
            context_growth=self.growth,
            contexts_left_out=self.left_out,
            packing_cost=self.packing,
            reference_model=next(map(self._reference_model, self.reference_models), None),
            reference_models=[self._reference_model(model) for model in self.reference_models],
            agreement=self.agreement,
            outputs_are_equal=self.agreement.difference is None,
            distinct_tokens=self.distinct_tokens,
            problems=self.problems,
        )

    def _reference_model(self, reference_model: ReferenceRuns) -> ReferenceFigures:
        return ReferenceFigures(
            name=reference_model.name,
            description=reference_model.description,
            parameters=reference_model.parameters,
            first_s=reference_model.first_s,
            **figures(reference_model.runs),
            ours=str(self.ours),
            our_rate_over_its=self.over_reference_model(reference_model),
        )


def case_figures(case: Case, runs: list[DecodeRun], *, is_warm_up: bool | None = None) -> CaseFigures:
    """Return a case's name and switches, its numbers of runs and of timed passes, and the spread of every figure."""
    places = runs[0].places
    return CaseFigures(
        name=str(case),
        cache=case.use_cache,
        batched=case.is_batched,
        compiled=case.is_compiled,
        n_runs=len(runs),
        passes_timed=runs[0].n_new if places is None else len(places),
        is_warm_up=is_warm_up,
        **figures(runs),
    )


def headline(settings: KvSettings, runs: Mapping[Case, list[DecodeRun]]) -> dict[str, Any]:
    """Return the tokens of one run and the throughput of the cached batch, of the naive loop, and their ratio.

    Figures that an interrupted benchmark did not measure are left out.
    """
    found: dict[str, Any] = {"generated_tokens": settings.batch_size * settings.max_new_tokens}
    cached = runs.get(Case(True, True))
    naive = runs.get(Case(False, settings.batch_size == 1))
    if cached:
        found["cached_tokens_per_s"] = Spread.of([run.tokens_per_s for run in cached])
    if naive:
        found["naive_tokens_per_s"] = Spread.of([run.tokens_per_s for run in naive])
    if cached and naive:
        found["cached_over_naive"] = _whole_ratio(cached, naive)
    return found


def _whole_ratio(above: Sequence[DecodeRun], below: Sequence[DecodeRun]) -> Spread:
    """Return the ratio of the throughputs of all new tokens, prefill included, run by run."""
    return paired_ratio(*shared_rounds([run.tokens_per_s for run in above], [run.tokens_per_s for run in below]))


def figures(runs: list[DecodeRun]) -> dict[str, Spread]:
    """Return the spread of every time and throughput of these runs."""
    return {name: Spread.of([getattr(run, name) for run in runs]) for name in _FIGURES}


def _decode_throughputs(runs: list[DecodeRun]) -> list[float]:
    return [run.decode_tokens_per_s for run in runs]

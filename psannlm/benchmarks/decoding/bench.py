"""Decoding benchmark: speedups of the KV cache, of batching and of compilation, and token parity between them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from psannlm.benchmarks.decoding.context_length import longest_state, measure_growth
from psannlm.benchmarks.decoding.modes import Case, DecodeRun, Prompts, decode, decode_uncached, spread_places
from psannlm.benchmarks.decoding.quantization_quality import TOKENS_PER_ROW, measure_packing_cost
from psannlm.benchmarks.decoding.report import KvReport, KvSettings, case_figures, headline
from psannlm.benchmarks.decoding.token_parity import Rounding, compare
from psannlm.benchmarks.harness.interleaved import Clock, Count, run_interleaved
from psannlm.benchmarks.harness.random_weights import randomize_parameters
from psannlm.benchmarks.harness.reference_models import (
    ReferenceModel,
    ReferenceRuns,
    build_reference_model,
    decode_with,
)
from psannlm.benchmarks.harness.reference_task import ReferenceTask
from psannlm.benchmarks.harness.roofline import memory_reader, step_bytes
from psannlm.config.model import ModelConfig
from psannlm.errors import ConfigError
from psannlm.generation.engine import Engine
from psannlm.models.accounting import Place, refuse_oversize
from psannlm.models.registry import build_model, resolve
from psannlm.models.transformer import Transformer
from psannlm.reports.schemas.decoding import Agreement, DecodingMetrics, GrowthPoint, PackingCost
from psannlm.runtime.device import describe_device
from psannlm.runtime.progress import OnProgress, ignore_progress

OnPartial = Callable[[DecodingMetrics], None]
# Fractions of a time limit: what passes without the cache may take, and after which no context length is measured.
_UNCACHED_FRACTION, _CASES_FRACTION = 0.5, 0.7
# Result of a run: a decoding run, or a memory bandwidth in bytes per second.
Candidate = Callable[[Count], DecodeRun | float]

REFERENCE = Case(True, True)
_FIRST = "first run, "
_READING = {True: "reading memory, batch", False: "reading memory, one row"}


ReferenceModelBuilder = Callable[[str, ReferenceTask], ReferenceModel]


def bench_kv(
    model: Transformer,
    settings: KvSettings,
    *,
    weights: str = "random",
    make_reference: ReferenceModelBuilder = build_reference_model,
    clock: Clock = time.perf_counter,
    on_progress: OnProgress = ignore_progress,
    on_partial: OnPartial = lambda metrics: None,
) -> KvReport:
    """Measure all cases, interleaved, on the device of ``model``; no row ends early.

    Tokens that differ or a cache of the wrong size are not errors here: the report's ``problems`` list them.

    Args:
        weights: where the weights come from, for the report.
        on_partial: called after every run with the figures so far, ``is_complete`` false.

    Raises:
        ConfigError: the model's context is too short for the prompts and new tokens.
        GenerationError: the dtype of ``settings`` is unknown.
    """
    config, device = model.config, model.embedding.weight.device
    limit = None if config.positional_encoding == "alibi" else config.max_seq_len
    if limit is not None and settings.n_tokens > limit:
        raise ConfigError(
            f"prompts of {settings.prompt_length} tokens and {settings.max_new_tokens} new ones exceed the model's "
            f"context of {limit}; lower --prompt-length or --max-new-tokens"
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    began = clock()
    described: dict[str, Any] = {
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        "weights": weights,
        "model": config.model_dump(mode="json"),
        "parameters": parameters,
    }
    bench = _Bench(
        model, settings, clock, on_progress, lambda metrics: on_partial(replace(metrics, **described)), began
    )
    task = ReferenceTask(config, parameters, settings.batch_size, settings.n_tokens, settings.dtype, device)
    reference_models = [make_reference(name, task) for name in settings.against]
    firsts = bench.run_first(reference_models)
    reference = firsts[str(REFERENCE)]
    runs, reference_runs, reads = bench.run_cases(reference.ids, reference_models)
    contexts, left_out = bench.contexts_within(limit)
    return KvReport(
        settings=settings,
        model=config,
        weights=weights,
        device=described["device"],
        threads=described["threads"],
        parameters=parameters,
        weight_bytes=bench.engine.weight_bytes,
        cache_element_bytes=bench.engine.cache_dtype.itemsize,
        runs=runs,
        agreement=bench.compare(reference, runs),
        n_bytes=bench.n_bytes,
        reads=reads,
        first_s={case: firsts[str(case)].total_s for case in runs if case.is_compiled},
        notices=list(dict.fromkeys([*bench.engine.notices, *bench.compiled.notices, *bench.notices])),
        growth=bench.measure_contexts(contexts),
        left_out=left_out,
        packing=None if settings.dtype == "float32" else bench.measure_packing(),
        reference_models=[
            ReferenceRuns(model.name, model.description, model.parameters, firsts[model.name].total_s, of_model)
            for model, of_model in zip(reference_models, reference_runs, strict=True)
        ],
    )


class _Bench:
    """State of one benchmark: engines, prompts, cases and their runs so far."""

    def __init__(
        self,
        model: Transformer,
        settings: KvSettings,
        clock: Clock,
        on_progress: OnProgress,
        on_partial: OnPartial,
        began: float,
    ) -> None:
        self.engine = Engine(model, dtype=settings.dtype)
        self.compiled = Engine(model, dtype=settings.dtype, compile=True) if settings.is_compiled else self.engine
        self.cases = settings.chosen_cases(self.compiled.compiles)
        self.prompts = random_prompts(model.config, settings)
        self.n_bytes = {
            is_batched: step_bytes(self.engine, settings.batch_size if is_batched else 1, settings.mean_context)
            for is_batched in (True, False)
            if any(case.is_batched == is_batched for case in self.cases)
        }
        self._model, self._device = model, model.embedding.weight.device
        self._settings, self._clock, self._on_progress = settings, clock, on_progress
        self._on_partial, self._began = on_partial, began
        self._made: dict[tuple[str, bool], list[DecodeRun]] = {}
        self.notices: list[str] = []

    def deadline(self, fraction: float) -> float | None:
        """Return the clock's time at which ``fraction`` of the time limit has passed; None without a limit."""
        limit = self._settings.time_limit_s
        return None if limit is None else self._began + fraction * limit

    def run_first(self, reference_models: Sequence[ReferenceModel]) -> dict[str, DecodeRun]:
        """Return the first run of every candidate with one-time work, such as compilation."""
        cases = [case for case in self.cases if case.is_compiled or case == REFERENCE]
        candidates = {str(case): self._cached(case) for case in cases}
        candidates |= {model.name: self._reference_model(model) for model in reference_models}
        # Without progress counts: the first tokens wait for the compiler and do not predict the remaining time.
        silent = {f"{_FIRST}{name}": _silent(candidate) for name, candidate in candidates.items()}
        taken = self._run_interleaved(silent, repeats=1, warm_ups=0)
        return {name.removeprefix(_FIRST): _runs_of(results)[0] for name, results in taken.items()}

    def run_cases(
        self, given: Prompts, reference_models: Sequence[ReferenceModel]
    ) -> tuple[dict[Case, list[DecodeRun]], list[list[DecodeRun]], dict[bool, list[float]]]:
        """Return the runs of every case, those of each reference model, and memory bandwidths, all interleaved."""
        steps = self._uncached_steps(given)
        candidates: dict[str, Candidate] = {
            str(case): self._cached(case) if case.use_cache else self._uncached(case, given, steps)
            for case in self.cases
        }
        candidates |= {model.name: self._reference_model(model) for model in reference_models}
        for is_batched, n_bytes in self.n_bytes.items():
            candidates[_READING[is_batched]] = memory_reader(n_bytes, self._device, clock=self._clock)
        # Under a time limit a long run has no warm-up: the first runs of all cases have warmed up the kernels.
        cold = [] if self._settings.time_limit_s is None else [str(case) for case in self.cases if case != REFERENCE]
        repeats = self._settings.repeats
        taken = self._run_interleaved(candidates, repeats=repeats, warm_ups=1, cold=cold)
        fewer = [f"{len(taken[name])} of {name}" for name in candidates if len(taken[name]) < repeats]
        if fewer:
            self.notices.append(
                f"of {repeats} runs of each case, the time limit of {self._settings.time_limit_s:,.0f} s allowed "
                f"{', '.join(fewer)}; raise --time-limit for all of them"
            )
        return (
            {case: _runs_of(taken[str(case)]) for case in self.cases},
            [_runs_of(taken[model.name]) for model in reference_models],
            {is_batched: _rates_of(taken[_READING[is_batched]]) for is_batched in self.n_bytes},
        )

    def _uncached_steps(self, given: Prompts) -> int | None:
        """Return how many full forward passes of a row to time after its first; None: all.

        Under a time limit, two passes of each case give the estimate of all; they also warm up.
        """
        settings, limit = self._settings, self._settings.time_limit_s
        uncached = [case for case in self.cases if not case.use_cache]
        if settings.uncached_steps is not None or limit is None or not uncached:
            return settings.uncached_steps
        estimate_s = 0.0
        for case in uncached:
            n_rows = settings.batch_size if case.is_batched else 1
            few = decode_uncached(
                self.engine,
                self.prompts[:n_rows],
                given[:n_rows],
                is_batched=case.is_batched,
                places=[0, settings.max_new_tokens - 1],
                clock=self._clock,
            )
            estimate_s += few.total_s * settings.batch_size / n_rows
        n_passes = int(settings.max_new_tokens * _UNCACHED_FRACTION * limit / max(estimate_s, 1e-9))
        return None if n_passes >= settings.max_new_tokens else max(2, n_passes - 1)

    def compare(self, reference: DecodeRun, runs: Mapping[Case, Sequence[DecodeRun]]) -> Agreement:
        """Compare the tokens of every run with those of the reference run, and these with full forward passes."""
        named = {str(REFERENCE): [reference, *runs[REFERENCE]]}
        named.update((str(case), list(made)) for case, made in runs.items() if case != REFERENCE)
        if self.engine.dtype == "float32":
            rounding = Rounding(copy.deepcopy(self._model).double(), self.engine.model)
        else:
            # int8 rounds its activations to bfloat16 too.
            rounded = self.engine if self.engine.dtype == "bfloat16" else Engine(self._model, dtype="bfloat16")
            rounding = Rounding(self._model, rounded.model)
        return compare(self.engine.model, self.prompts, named, rounding)

    def contexts_within(self, limit: int | None) -> tuple[list[int], list[int]]:
        """Return the context lengths to measure, and those beyond the model's ``limit``.

        Where the cases used up most of the time limit, no length is measured, and a notice says so.
        """
        settings, elapsed_s = self._settings, self._clock() - self._began
        contexts = [context for context in settings.contexts if limit is None or longest_state([context]) <= limit]
        left_out = [context for context in settings.contexts if context not in contexts]
        limit_s = settings.time_limit_s
        if not contexts or limit_s is None or elapsed_s <= _CASES_FRACTION * limit_s:
            return contexts, left_out
        self.notices.append(
            f"no context length was measured: the cases took {elapsed_s:,.0f} s of the time limit of {limit_s:,.0f} s; "
            "raise --time-limit to measure them"
        )
        return [], left_out

    def measure_contexts(self, contexts: Sequence[int]) -> list[GrowthPoint]:
        """Time a decoding step at each context length."""
        return measure_growth(
            self.compiled,
            self._settings.batch_size,
            contexts,
            repeats=self._settings.repeats,
            seed=self._settings.seed,
            clock=self._clock,
            on_progress=self._on_progress,
            deadline=self.deadline(1.0),
        )

    def measure_packing(self) -> PackingCost:
        """Measure the perplexity cost of the quantized weights."""
        return measure_packing_cost(
            self._model,
            self.engine,
            seed=self._settings.seed,
            clock=self._clock,
            on_progress=self._on_progress,
            deadline=self.deadline(1.0),
        )

    def _run_interleaved(
        self, candidates: Mapping[str, Candidate], *, repeats: int, warm_ups: int, cold: Collection[str] = ()
    ) -> dict[str, list[DecodeRun | float]]:
        return run_interleaved(
            candidates,
            repeats,
            warm_ups=warm_ups,
            unit="tokens",
            clock=self._clock,
            on_progress=self._on_progress,
            deadline=self.deadline(_CASES_FRACTION),
            cold=cold,
            on_result=self._keep,
        )

    def _keep(self, name: str, is_warm_up: bool, result: DecodeRun | float) -> None:
        """Report the figures of all runs so far; a case without a counted run has those of its warm-up."""
        case = next((case for case in self.cases if name.removeprefix(_FIRST) == str(case)), None)
        if case is None or not isinstance(result, DecodeRun):
            return
        is_counted = not (is_warm_up or name.startswith(_FIRST))
        self._made.setdefault((str(case), is_counted), []).append(result)
        counted = {case: self._made[str(case), True] for case in self.cases if (str(case), True) in self._made}
        best = {
            **{case: self._made[str(case), False] for case in self.cases if (str(case), False) in self._made},
            **counted,
        }
        cases = [case_figures(case, runs, is_warm_up=case not in counted) for case, runs in best.items()]
        settings = {**self._settings.figures(), "cases": cases}
        self._on_partial(DecodingMetrics(is_complete=False, **settings, **headline(self._settings, best)))

    def _cached(self, case: Case) -> Candidate:
        engine, n_new = self.compiled if case.is_compiled else self.engine, self._settings.max_new_tokens
        return lambda count: decode(
            engine, self.prompts, n_new, is_batched=case.is_batched, clock=self._clock, count=count
        )

    def _uncached(self, case: Case, given: Prompts, n_steps: int | None) -> Candidate:
        places = spread_places(self._settings.max_new_tokens, n_steps)
        return lambda count: decode_uncached(
            self.engine,
            self.prompts,
            given,
            is_batched=case.is_batched,
            places=places,
            clock=self._clock,
            count=count,
        )

    def _reference_model(self, reference_model: ReferenceModel) -> Candidate:
        return lambda count: decode_with(reference_model, self.prompts, self._settings.max_new_tokens, self._clock)


def _silent(candidate: Candidate) -> Candidate:
    return lambda count: candidate(lambda done, total: None)


def _runs_of(results: Sequence[DecodeRun | float]) -> list[DecodeRun]:
    return [result for result in results if isinstance(result, DecodeRun)]


def _rates_of(results: Sequence[DecodeRun | float]) -> list[float]:
    return [result for result in results if not isinstance(result, DecodeRun)]


def build_random_model(config: ModelConfig, settings: KvSettings, device: torch.device) -> Transformer:
    """Build a model of ``config`` with random float32 weights and a context long enough for ``settings``.

    No parameter is zero: with the initialization for training, where residual branches and short convolutions start at
    zero, a broken cache would go unnoticed.

    Raises:
        ConfigError: ``config`` has no vocabulary size.
    """
    max_seq_len = max(settings.n_tokens, longest_state(settings.contexts))
    if settings.dtype != "float32":
        max_seq_len = max(max_seq_len, 1 + TOKENS_PER_ROW)
    resolved = resolve(config.model_copy(update={"max_seq_len": max_seq_len}))
    refuse_oversize(resolved, config.vocab_size or 1, Place(for_training=False))
    model = build_model(resolved, seed=settings.seed).eval()
    randomize_parameters(model, settings.seed)
    return model.to(device)


def random_prompts(config: ModelConfig, settings: KvSettings) -> Prompts:
    """Return the prompts: ids sampled uniformly from the vocabulary, determined by the seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.batch_size, settings.prompt_length)
    drawn: Prompts = torch.randint(config.vocab_size or 0, size, generator=generator).tolist()
    return drawn

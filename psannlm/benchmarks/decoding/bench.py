"""A model and a batch in; what the cache, batching and compiling are worth each, and whether tokens change, out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch

from psannlm.benchmarks.decoding.context_length import longest_state, measure_growth
from psannlm.benchmarks.decoding.modes import Case, DecodeRun, Prompts, decode, decode_uncached, spread_places
from psannlm.benchmarks.decoding.quantization_quality import TOKENS_PER_ROW, measure_packing_cost
from psannlm.benchmarks.decoding.random_weights import randomize_parameters
from psannlm.benchmarks.decoding.report import KvReport, KvSettings, case_figures, headline
from psannlm.benchmarks.decoding.token_parity import Agreement, Rounding, compare
from psannlm.benchmarks.harness.interleaved import Clock, Count, Progress, run_interleaved
from psannlm.benchmarks.harness.reference_llama import ReferenceModel, ReferenceRuns, build_reference_model, decode_with
from psannlm.benchmarks.harness.roofline import memory_reader, step_bytes
from psannlm.config.model import ModelConfig
from psannlm.errors import ConfigError
from psannlm.generation.engine import Engine
from psannlm.models.accounting import Place, refuse_oversize
from psannlm.models.registry import build_model, resolve
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import describe_device

OnProgress = Callable[[Progress], None]
OnPartial = Callable[[dict[str, Any]], None]
# Of a time limit: what passes without the cache may take, and after which part no context is measured any more.
_UNCACHED_FRACTION, _CASES_FRACTION = 0.5, 0.7
# What a turn gives: a run, or a reading rate in bytes per second.
Candidate = Callable[[Count], DecodeRun | float]

REFERENCE = Case(True, True)
_FIRST = "first run, "
_READING = {True: "reading as many bytes", False: "reading as many bytes, one row"}


class ReferenceModelBuilder(Protocol):
    """What makes the reference model of a name, such as ``reference_llama.build_reference_model``."""

    def __call__(
        self, name: str, config: ModelConfig, parameters: int, seq_len: int, device: torch.device
    ) -> ReferenceModel:
        """Return it, for rows of at most ``seq_len`` tokens."""
        ...


def bench_kv(
    model: Transformer,
    settings: KvSettings,
    *,
    weights: str = "random",
    make_reference: ReferenceModelBuilder = build_reference_model,
    clock: Clock = time.perf_counter,
    on_progress: OnProgress = lambda progress: None,
    on_partial: OnPartial = lambda figures: None,
) -> KvReport:
    """Measure all cases in turns on ``model``, on the device that it is on; no row ends early.

    A model or a cache that breaks its promise is no error here: the report's ``problems`` say so.

    Args:
        weights: where they come from, for the report.
        on_partial: called after every run with the figures so far, as plain data whose ``is_complete`` is false.

    Raises:
        ConfigError: the model's context is too short for what is to be decoded.
        GenerationError: the dtype of ``settings`` is not known.
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
    bench = _Bench(model, settings, clock, on_progress, lambda figures: on_partial({**figures, **described}), began)
    reference_model = None
    if settings.against is not None:
        reference_model = make_reference(settings.against, config, parameters, settings.n_tokens, device)
    firsts = bench.run_first(reference_model)
    reference = firsts[str(REFERENCE)]
    runs, reference_runs, reads = bench.run_cases(reference.ids, reference_model)
    contexts = [context for context in settings.contexts if limit is None or longest_state([context]) <= limit]
    left_out = [context for context in settings.contexts if context not in contexts]
    if contexts and settings.time_limit_s is not None and clock() - began > _CASES_FRACTION * settings.time_limit_s:
        bench.notices.append(
            f"no step at growing contexts was timed: the cases took {clock() - began:,.0f} s of the time limit of "
            f"{settings.time_limit_s:,.0f} s; raise --time-limit for it"
        )
        contexts = []
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
        growth=measure_growth(
            bench.compiled,
            settings.batch_size,
            contexts,
            repeats=settings.repeats,
            seed=settings.seed,
            clock=clock,
            on_progress=on_progress,
            deadline=bench.deadline(1.0),
        ),
        left_out=left_out,
        packing=None
        if settings.dtype == "float32"
        else measure_packing_cost(
            model,
            bench.engine,
            seed=settings.seed,
            clock=clock,
            on_progress=on_progress,
            deadline=bench.deadline(1.0),
        ),
        reference_model=None
        if reference_model is None
        else ReferenceRuns(
            reference_model.name,
            reference_model.description,
            reference_model.parameters,
            firsts[reference_model.name].total_s,
            reference_runs,
        ),
    )


class _Bench:
    """One benchmark under way: the engines, the prompts, and what is run in turns."""

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
        """Return the time of the clock at which ``fraction`` of the time limit is used up; None without a limit."""
        limit = self._settings.time_limit_s
        return None if limit is None else self._began + fraction * limit

    def run_first(self, reference_model: ReferenceModel | None) -> dict[str, DecodeRun]:
        """Return the very first run of every candidate that has something to prepare, compilation above all."""
        cases = [case for case in self.cases if case.is_compiled or case == REFERENCE]
        candidates = {str(case): self._cached(case) for case in cases}
        if reference_model is not None:
            candidates[reference_model.name] = self._reference_model(reference_model)
        # Without a count: the first tokens wait for a compiler, and say nothing of the time that is left.
        silent = {f"{_FIRST}{name}": _silent(candidate) for name, candidate in candidates.items()}
        taken = self._in_turns(silent, repeats=1, warm_ups=0)
        return {name.removeprefix(_FIRST): _runs_of(results)[0] for name, results in taken.items()}

    def run_cases(
        self, given: Prompts, reference_model: ReferenceModel | None
    ) -> tuple[dict[Case, list[DecodeRun]], list[DecodeRun], dict[bool, list[float]]]:
        """Return the runs of every case, those of the reference model, and the rates of reading, all made in turns."""
        steps = self._uncached_steps(given)
        candidates: dict[str, Candidate] = {
            str(case): self._cached(case) if case.use_cache else self._uncached(case, given, steps)
            for case in self.cases
        }
        if reference_model is not None:
            candidates[reference_model.name] = self._reference_model(reference_model)
        for is_batched, n_bytes in self.n_bytes.items():
            candidates[_READING[is_batched]] = memory_reader(n_bytes, self._device, clock=self._clock)
        # Under a time limit a long run is not made twice: the first runs of all cases have warmed up the kernels.
        cold = [] if self._settings.time_limit_s is None else [str(case) for case in self.cases if case != REFERENCE]
        repeats = self._settings.repeats
        taken = self._in_turns(candidates, repeats=repeats, warm_ups=1, cold=cold)
        fewer = [f"{len(taken[name])} of {name}" for name in candidates if len(taken[name]) < repeats]
        if fewer:
            self.notices.append(
                f"of {repeats} runs of each case, the time limit of {self._settings.time_limit_s:,.0f} s left room for "
                f"{', '.join(fewer)}; raise --time-limit for all of them"
            )
        return (
            {case: _runs_of(taken[str(case)]) for case in self.cases},
            [] if reference_model is None else _runs_of(taken[reference_model.name]),
            {is_batched: _rates_of(taken[_READING[is_batched]]) for is_batched in self.n_bytes},
        )

    def _uncached_steps(self, given: Prompts) -> int | None:
        """Return how many full passes of a row to time after its first; None: all.

        Under a time limit, two passes of each case show how long all would take; they are warm-up as well.
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
        """Compare every run with the first one, from before the turns, and that with full forward passes."""
        named = {str(REFERENCE): [reference, *runs[REFERENCE]]}
        named.update((str(case), list(made)) for case, made in runs.items() if case != REFERENCE)
        if self.engine.dtype == "float32":
            rounding = Rounding(copy.deepcopy(self._model).double(), self.engine.model)
        else:
            # int8 rounds its activations to bfloat16 too.
            rounded = self.engine if self.engine.dtype == "bfloat16" else Engine(self._model, dtype="bfloat16")
            rounding = Rounding(self._model, rounded.model)
        return compare(self.engine.model, self.prompts, named, rounding)

    def _in_turns(
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
        """Pass on the figures of all runs so far; a case without a counted run has those of its warm-up."""
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
        self._on_partial(
            {
                "is_complete": False,
                **asdict(self._settings),
                **headline(self._settings, best),
                "cases": [
                    {**case_figures(case, runs), "is_warm_up": case not in counted} for case, runs in best.items()
                ],
            }
        )

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
    """Build a model of ``config`` with a context for all that ``settings`` ask, and with random float32 weights.

    They are such that every part of the model shows in its output. As they are drawn for training, branches and short
    convolutions start at zero: any cache would do for such a model.

    Raises:
        ConfigError: ``config`` has no vocabulary size.
    """
    room = max(settings.n_tokens, longest_state(settings.contexts))
    if settings.dtype != "float32":
        room = max(room, 1 + TOKENS_PER_ROW)
    resolved = resolve(config.model_copy(update={"max_seq_len": room}))
    refuse_oversize(resolved, config.vocab_size or 1, Place(for_training=False))
    model = build_model(resolved, seed=settings.seed).eval()
    randomize_parameters(model, settings.seed)
    return model.to(device)


def random_prompts(config: ModelConfig, settings: KvSettings) -> Prompts:
    """Return the batch's prompts: ids drawn evenly from the vocabulary, from the seed alone."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.batch_size, settings.prompt_length)
    drawn: Prompts = torch.randint(config.vocab_size or 0, size, generator=generator).tolist()
    return drawn

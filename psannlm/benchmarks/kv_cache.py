"""A model and a batch in; what the cache, batching and compiling are worth each, and whether tokens change, out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from psannlm.benchmarks.agreement import Agreement, Rounding, compare
from psannlm.benchmarks.bandwidth import memory_reader, step_bytes
from psannlm.benchmarks.decoding import Case, DecodeRun, Prompts, decode, decode_uncached, spread_places
from psannlm.benchmarks.growth import longest_state, measure_growth
from psannlm.benchmarks.kv_report import KvReport, KvSettings
from psannlm.benchmarks.packing_cost import TOKENS_PER_ROW, measure_packing_cost
from psannlm.benchmarks.random_weights import show_every_part
from psannlm.benchmarks.rivals import Rival, RivalRuns, build_rival, decode_with
from psannlm.benchmarks.timing import Clock, Count, Standing, take_turns
from psannlm.config.model import ModelConfig
from psannlm.device import describe_device
from psannlm.errors import ConfigError
from psannlm.generation.engine import Engine
from psannlm.models.registry import build_model, resolve
from psannlm.models.transformer import Transformer

OnStanding = Callable[[Standing], None]
# What a turn gives: a run, or a reading rate in bytes per second.
Candidate = Callable[[Count], DecodeRun | float]

REFERENCE = Case(True, True)
_READING = {True: "reading as many bytes", False: "reading as many bytes, one row"}


class RivalBuilder(Protocol):
    """What makes the rival of a name, such as ``rivals.build_rival``."""

    def __call__(self, name: str, config: ModelConfig, parameters: int, seq_len: int, device: torch.device) -> Rival:
        """Return it, for rows of at most ``seq_len`` tokens."""
        ...


def bench_kv(
    model: Transformer,
    settings: KvSettings,
    *,
    weights: str = "random",
    make_rival: RivalBuilder = build_rival,
    clock: Clock = time.perf_counter,
    on_standing: OnStanding = lambda standing: None,
) -> KvReport:
    """Measure all cases in turns on ``model``, on the device that it is on; no row ends early.

    A model or a cache that breaks its promise is no error here: the report's ``problems`` say so.

    Args:
        weights: where they come from, for the report.

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
    bench = _Bench(model, settings, clock, on_standing)
    rival = None
    if settings.against is not None:
        rival = make_rival(settings.against, config, parameters, settings.n_tokens, device)
    firsts = bench.run_first(rival)
    reference = firsts[str(REFERENCE)]
    runs, rival_runs, reads = bench.take_turns(reference.ids, rival)
    contexts = [context for context in settings.contexts if limit is None or longest_state([context]) <= limit]
    return KvReport(
        settings=settings,
        model=config,
        weights=weights,
        device=describe_device(device),
        threads=torch.get_num_threads(),
        parameters=parameters,
        weight_bytes=bench.engine.weight_bytes,
        cache_element_bytes=bench.engine.cache_dtype.itemsize,
        runs=runs,
        agreement=bench.compare(reference, runs),
        n_bytes=bench.n_bytes,
        reads=reads,
        first_s={case: firsts[str(case)].total_s for case in runs if case.is_compiled},
        notices=list(dict.fromkeys([*bench.engine.notices, *bench.compiled.notices])),
        growth=measure_growth(
            bench.compiled,
            settings.batch_size,
            contexts,
            repeats=settings.repeats,
            seed=settings.seed,
            clock=clock,
            on_standing=on_standing,
        ),
        left_out=[context for context in settings.contexts if context not in contexts],
        packing=None
        if settings.dtype == "float32"
        else measure_packing_cost(model, bench.engine, seed=settings.seed, clock=clock, on_standing=on_standing),
        rival=None
        if rival is None
        else RivalRuns(rival.name, rival.description, rival.parameters, firsts[rival.name].total_s, rival_runs),
    )


class _Bench:
    """One benchmark under way: the engines, the prompts, and what is run in turns."""

    def __init__(self, model: Transformer, settings: KvSettings, clock: Clock, on_standing: OnStanding) -> None:
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
        self._settings, self._clock, self._on_standing = settings, clock, on_standing

    def run_first(self, rival: Rival | None) -> dict[str, DecodeRun]:
        """Return the very first run of every candidate that has something to prepare, compilation above all."""
        cases = [case for case in self.cases if case.is_compiled or case == REFERENCE]
        candidates = {str(case): self._cached(case) for case in cases}
        if rival is not None:
            candidates[rival.name] = self._rival(rival)
        # Without a count: the first tokens wait for a compiler, and say nothing of the time that is left.
        silent = {f"first run, {name}": _silent(candidate) for name, candidate in candidates.items()}
        taken = self._in_turns(silent, repeats=1, warm_ups=0)
        return {name.removeprefix("first run, "): _runs_of(results)[0] for name, results in taken.items()}

    def take_turns(
        self, given: Prompts, rival: Rival | None
    ) -> tuple[dict[Case, list[DecodeRun]], list[DecodeRun], dict[bool, list[float]]]:
        """Return the runs of every case, those of the rival, and the rates of reading, all made in turns."""
        candidates: dict[str, Candidate] = {
            str(case): self._cached(case) if case.use_cache else self._uncached(case, given) for case in self.cases
        }
        if rival is not None:
            candidates[rival.name] = self._rival(rival)
        for is_batched, n_bytes in self.n_bytes.items():
            candidates[_READING[is_batched]] = memory_reader(n_bytes, self._device, clock=self._clock)
        taken = self._in_turns(candidates, repeats=self._settings.repeats, warm_ups=1)
        return (
            {case: _runs_of(taken[str(case)]) for case in self.cases},
            [] if rival is None else _runs_of(taken[rival.name]),
            {is_batched: _rates_of(taken[_READING[is_batched]]) for is_batched in self.n_bytes},
        )

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
        self, candidates: Mapping[str, Candidate], *, repeats: int, warm_ups: int
    ) -> dict[str, list[DecodeRun | float]]:
        return take_turns(
            candidates,
            repeats,
            warm_ups=warm_ups,
            unit="tokens",
            clock=self._clock,
            on_standing=self._on_standing,
        )

    def _cached(self, case: Case) -> Candidate:
        engine, n_new = self.compiled if case.is_compiled else self.engine, self._settings.max_new_tokens
        return lambda count: decode(
            engine, self.prompts, n_new, is_batched=case.is_batched, clock=self._clock, count=count
        )

    def _uncached(self, case: Case, given: Prompts) -> Candidate:
        places = spread_places(self._settings.max_new_tokens, self._settings.uncached_steps)
        return lambda count: decode_uncached(
            self.engine,
            self.prompts,
            given,
            is_batched=case.is_batched,
            places=places,
            clock=self._clock,
            count=count,
        )

    def _rival(self, rival: Rival) -> Candidate:
        return lambda count: decode_with(rival, self.prompts, self._settings.max_new_tokens, self._clock)


def _silent(candidate: Candidate) -> Candidate:
    return lambda count: candidate(lambda done, total: None)


def _runs_of(results: Sequence[DecodeRun | float]) -> list[DecodeRun]:
    return [result for result in results if isinstance(result, DecodeRun)]


def _rates_of(results: Sequence[DecodeRun | float]) -> list[float]:
    return [result for result in results if not isinstance(result, DecodeRun)]


def build_random_model(config: ModelConfig, settings: KvSettings, device: torch.device) -> Transformer:
    """Build a model of ``config`` with a context for all that ``settings`` ask, and with random float32 weights.

    They are such that every part of the model shows in its output. As they are drawn for training, branches and waves
    start at zero: any cache would do for such a model.

    Raises:
        ConfigError: ``config`` has no vocabulary size.
    """
    room = max(settings.n_tokens, longest_state(settings.contexts))
    if settings.dtype != "float32":
        room = max(room, 1 + TOKENS_PER_ROW)
    model = build_model(resolve(config.model_copy(update={"max_seq_len": room})), seed=settings.seed).eval()
    show_every_part(model, settings.seed)
    return model.to(device)


def random_prompts(config: ModelConfig, settings: KvSettings) -> Prompts:
    """Return the batch's prompts: ids drawn evenly from the vocabulary, from the seed alone."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.batch_size, settings.prompt_length)
    drawn: Prompts = torch.randint(config.vocab_size or 0, size, generator=generator).tolist()
    return drawn

"""Sizes of a model and a batch in; what the cache and batching are worth each, and whether tokens change, out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch

from psannlm.benchmarks.decoding import CASES, Case, DecodeRun, Prompts, decode
from psannlm.benchmarks.timing import Clock, Count, Spread, Standing, paired_ratio, take_turns
from psannlm.config.model import ModelConfig
from psannlm.device import describe_device
from psannlm.errors import ConfigError
from psannlm.models.accounting import cache_bytes
from psannlm.models.registry import build_model, resolve
from psannlm.models.transformer import Transformer


@dataclass(frozen=True)
class KvSettings:
    """What is decoded: ``batch_size`` prompts of ``prompt_length`` random tokens, each continued by ``max_new_tokens``.

    Raises:
        ConfigError: a number is too small to measure anything.
    """

    batch_size: int = 8
    prompt_length: int = 96
    max_new_tokens: int = 64
    repeats: int = 3
    seed: int = 1337

    def __post_init__(self) -> None:
        lowest = {"batch_size": 1, "prompt_length": 1, "max_new_tokens": 2, "repeats": 1, "seed": 0}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} {getattr(self, name)} is too small; use {least} or more")


@dataclass(frozen=True)
class Difference:
    """The first new token, counted from 0, at which two ways of decoding part; ``gap`` is between its logits."""

    row: int
    place: int
    first: str
    first_token: int
    second: str
    second_token: int
    gap: float

    def __str__(self) -> str:
        return (
            f"outputs differ first at row {self.row}, new token {self.place}: {self.first_token} with {self.first}, "
            f"{self.second_token} with {self.second}; in a full forward pass their logits are {self.gap:.2g} apart "
            "(below about 1e-5, rounding may decide: try another --seed)"
        )


@dataclass(frozen=True)
class KvReport:
    """The benchmark's outcome; ``problems`` names each promise that was broken."""

    settings: KvSettings
    model: ModelConfig
    device: str
    parameters: int
    runs: dict[Case, list[DecodeRun]]
    difference: Difference | None
    predicted_cache_bytes: dict[Case, int]

    def rate(self, case: Case) -> Spread:
        """Return the decode rate of a case in tokens per second, after the first token."""
        return Spread.of([run.decode_tokens_per_s for run in self.runs[case]])

    def from_cache(self, is_batched: bool) -> Spread:
        """Return how many times faster the cache alone makes decoding: same rows at a time, turn by turn."""
        return self._ratio(Case(True, is_batched), Case(False, is_batched))

    def from_batching(self, use_cache: bool) -> Spread:
        """Return how many times faster batching alone makes decoding: same use of the cache, turn by turn."""
        return self._ratio(Case(use_cache, True), Case(use_cache, False))

    def _ratio(self, above: Case, below: Case) -> Spread:
        rates = [[run.decode_tokens_per_s for run in self.runs[case]] for case in (above, below)]
        return paired_ratio(*rates)

    @property
    def measured_cache_bytes(self) -> dict[Case, int]:
        """The largest state that was held, of each case that has one."""
        return {case: max(run.cache_bytes for run in self.runs[case]) for case in CASES if case.use_cache}

    @property
    def distinct_tokens(self) -> int:
        """How many different ids the outputs hold: if there are few, their equality says little."""
        return len({token for row in self.runs[CASES[0]][0].ids for token in row})

    @property
    def problems(self) -> list[str]:
        """Return what did not hold, in words: outputs that differ, a cache of another size than predicted."""
        found = [] if self.difference is None else [str(self.difference)]
        for case, measured in self.measured_cache_bytes.items():
            predicted = self.predicted_cache_bytes[case]
            if measured != predicted:
                found.append(f"{case}: the cache takes {measured:,} bytes, models.accounting predicts {predicted:,}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return settings, figures and ratios as plain data."""
        return {
            **asdict(self.settings),
            "device": self.device,
            "dtype": "float32",
            "model": self.model.model_dump(mode="json"),
            "parameters": self.parameters,
            "cases": [{"cache": c.use_cache, "batched": c.is_batched, **self._figures(c)} for c in CASES],
            "speedup_of_decoding": {
                "cache_alone_in_batch": self.from_cache(True).as_dict(),
                "cache_alone_one_row": self.from_cache(False).as_dict(),
                "batching_alone_with_cache": self.from_batching(True).as_dict(),
                "batching_alone_without_cache": self.from_batching(False).as_dict(),
            },
            "cache_bytes": {
                str(case): {"measured": measured, "predicted": self.predicted_cache_bytes[case]}
                for case, measured in self.measured_cache_bytes.items()
            },
            "outputs_are_equal": self.difference is None,
            "first_difference": None if self.difference is None else asdict(self.difference),
            "distinct_tokens": self.distinct_tokens,
            "problems": self.problems,
        }

    def _figures(self, case: Case) -> dict[str, dict[str, float]]:
        names = ("prefill_s", "first_token_s", "decode_s", "total_s", "decode_tokens_per_s", "tokens_per_s")
        return {name: Spread.of([getattr(run, name) for run in self.runs[case]]).as_dict() for name in names}


def bench_kv(
    config: ModelConfig,
    settings: KvSettings,
    *,
    device: torch.device,
    clock: Clock = time.perf_counter,
    on_standing: Callable[[Standing], None] = lambda standing: None,
) -> KvReport:
    """Measure the four cases in turns on a model of ``config`` with random float32 weights.

    ``max_seq_len`` is set to what is decoded, and no row ends early. A model or a cache that breaks its promise is no
    error here: the report's ``problems`` say so.

    Raises:
        ConfigError: ``config`` has no vocabulary size.
    """
    config = resolve(config.model_copy(update={"max_seq_len": settings.prompt_length + settings.max_new_tokens}))
    model = build_random_model(config, settings.seed, device)
    prompts = random_prompts(config, settings)

    def candidate(case: Case) -> Callable[[Count], DecodeRun]:
        return lambda count: decode(model, prompts, settings.max_new_tokens, case, clock=clock, count=count)

    by_name = take_turns(
        {str(case): candidate(case) for case in CASES},
        settings.repeats,
        unit="tokens",
        clock=clock,
        on_standing=on_standing,
    )
    runs = {case: by_name[str(case)] for case in CASES}
    return KvReport(
        settings=settings,
        model=config,
        device=describe_device(device),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        runs=runs,
        difference=first_difference(model, prompts, runs),
        predicted_cache_bytes={
            case: cache_bytes(config, settings.batch_size if case.is_batched else 1, config.max_seq_len or 0)
            for case in CASES
            if case.use_cache
        },
    )


def build_random_model(config: ModelConfig, seed: int, device: torch.device) -> Transformer:
    """Build the model of a resolved ``config`` with weights such that every part of it shows in its output.

    As they are drawn for training, branches and waves start at zero: any cache would do for such a model.
    """
    model = build_model(config, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.add_(noise * 0.3)
    return model.to(device)


def random_prompts(config: ModelConfig, settings: KvSettings) -> Prompts:
    """Return the batch's prompts: ids drawn evenly from the vocabulary, from the seed alone."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.batch_size, settings.prompt_length)
    drawn: Prompts = torch.randint(config.vocab_size or 0, size, generator=generator).tolist()
    return drawn


def first_difference(
    model: Transformer, prompts: Prompts, runs: Mapping[Case, Sequence[DecodeRun]]
) -> Difference | None:
    """Compare the ids of all runs of all cases with the first; return where the earliest new token differs, or None."""
    every = [(str(case), run.ids) for case, made in runs.items() for run in made]
    places = []
    for (first, ids), (second, others) in combinations(every, 2):
        for row, (mine, yours) in enumerate(zip(ids, others, strict=True)):
            for place, (a, b) in enumerate(zip(mine, yours, strict=True)):
                if a != b:
                    places.append((place, row, first, a, second, b, mine[:place]))
                    break
    if not places:
        return None
    place, row, first, a, second, b, before = min(places)
    with torch.inference_mode():
        sequence = torch.tensor([prompts[row] + before], device=model.embedding.weight.device)
        logits = model.logits(model.hidden_states(sequence)[0, -1])
    return Difference(row, place, first, a, second, b, float((logits[a] - logits[b]).abs()))

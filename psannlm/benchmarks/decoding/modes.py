"""Timed greedy decoding with and without the KV cache, batched and row by row.

Each token comes from the cache or from a full forward pass over the growing sequence, for all rows together or for
one row at a time. The two switches are independent, so that the gain of each can be measured. All modes use the same
packed weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from psannlm.benchmarks.harness.interleaved import Clock, Count
from psannlm.generation.batch_decode import BatchDecoder
from psannlm.generation.engine import Engine
from psannlm.generation.requests import SamplingConfig
from psannlm.generation.sampling import next_tokens

_GREEDY = SamplingConfig(temperature=0.0)

Prompts = list[list[int]]


@dataclass(frozen=True)
class Case:
    """A way of decoding; ``is_compiled`` is only used with the cache."""

    use_cache: bool
    is_batched: bool
    is_compiled: bool = False

    def __str__(self) -> str:
        parts = [f"cache {'on' if self.use_cache else 'off'}", "batch" if self.is_batched else "row by row"]
        return ", ".join([*parts, "compiled"] if self.is_compiled else parts)


CASES = tuple(Case(use_cache, is_batched) for use_cache in (True, False) for is_batched in (True, False))


@dataclass(frozen=True)
class DecodeRun:
    """Tokens and times of one decoding run.

    Attributes:
        ids: the chosen ids of each row, one for each of ``places``.
        n_new: new tokens of each row that the seconds are for.
        prefill_s: seconds from the prompts to their next-token logits; row by row, the sum over rows.
        first_token_s: seconds from the prompt to the first token; row by row, the mean over rows.
        decode_s: seconds from the first token to the last; row by row, the sum over rows.
        total_s: seconds of the whole batch.
        places: positions of the new tokens, from 0, that were computed, each after the *given* tokens; None: all
            tokens, each after the run's own.
        cache_bytes: size of the KV cache at the end, for all rows decoded at once; 0 without a cache.
        cache_slots: capacity of that cache, in tokens per row.
    """

    ids: Prompts
    n_new: int
    prefill_s: float
    first_token_s: float
    decode_s: float
    total_s: float
    places: tuple[int, ...] | None = None
    cache_bytes: int = 0
    cache_slots: int = 0

    @property
    def decode_tokens_per_s(self) -> float:
        """Throughput of the tokens after each row's first."""
        return len(self.ids) * (self.n_new - 1) / self.decode_s

    @property
    def tokens_per_s(self) -> float:
        """Throughput of all new tokens, prefill included."""
        return len(self.ids) * self.n_new / self.total_s

    @classmethod
    def join(cls, rows: Sequence[DecodeRun]) -> DecodeRun:
        """Combine the runs of single rows into one run."""
        return cls(
            ids=[ids for row in rows for ids in row.ids],
            n_new=rows[0].n_new,
            prefill_s=sum(row.prefill_s for row in rows),
            first_token_s=sum(row.first_token_s for row in rows) / len(rows),
            decode_s=sum(row.decode_s for row in rows),
            total_s=sum(row.total_s for row in rows),
            places=rows[0].places,
            cache_bytes=max(row.cache_bytes for row in rows),
            cache_slots=max(row.cache_slots for row in rows),
        )


def decode(
    engine: Engine,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    is_batched: bool,
    clock: Clock = time.perf_counter,
    count: Count = lambda done, total: None,
) -> DecodeRun:
    """Decode ``prompts`` (all of one length) greedily with the cache; ``count`` is called after every token."""
    if is_batched:
        total = len(prompts) * max_new_tokens
        return _decode(engine, prompts, max_new_tokens, clock, lambda done: count(done, total))
    return _row_by_row(
        lambda row, count_row: _decode(engine, prompts[row : row + 1], max_new_tokens, clock, count_row),
        len(prompts),
        max_new_tokens,
        count,
    )


def decode_uncached(
    engine: Engine,
    prompts: Prompts,
    given: Prompts,
    *,
    is_batched: bool,
    places: Sequence[int] | None = None,
    clock: Clock = time.perf_counter,
    count: Count = lambda done, total: None,
) -> DecodeRun:
    """Choose every token by a full forward pass over the prompt and the ``given`` tokens before it.

    Each choice is compared by itself: if every one equals its given token, decoding without a cache would generate
    the same continuation. The work is the same.

    Args:
        given: the continuation of each prompt.
        places: ascending positions of the new tokens to compute, with 0 and the last; None: all. The seconds of the
            others are interpolated linearly.
    """
    chosen = tuple(range(len(given[0])) if places is None else places)
    if is_batched:
        total = len(prompts) * len(chosen)
        return _decode_uncached(engine, prompts, given, chosen, clock, lambda done: count(done, total))
    return _row_by_row(
        lambda row, count_row: _decode_uncached(
            engine, prompts[row : row + 1], given[row : row + 1], chosen, clock, count_row
        ),
        len(prompts),
        len(chosen),
        count,
    )


def spread_places(n_new: int, n_steps: int | None) -> list[int]:
    """Return the positions to compute of ``n_new`` tokens: 0, and ``n_steps`` of the others, evenly, ends included."""
    if n_steps is None or n_steps >= n_new - 1:
        return list(range(n_new))
    return [0, *sorted({1 + round(index * (n_new - 2) / (n_steps - 1)) for index in range(n_steps)})]


def _row_by_row(
    run: Callable[[int, Callable[[int], None]], DecodeRun], n_rows: int, tokens_each: int, count: Count
) -> DecodeRun:
    total = n_rows * tokens_each

    def decode_row(row: int) -> DecodeRun:
        return run(row, lambda done: count(row * tokens_each + done, total))

    return DecodeRun.join([decode_row(row) for row in range(n_rows)])


def _decode(
    engine: Engine, prompts: Prompts, max_new_tokens: int, clock: Clock, count: Callable[[int], None]
) -> DecodeRun:
    """Decode as ``psannlm generate`` does."""
    began = clock()
    decoding = BatchDecoder(engine, prompts, max_new_tokens=max_new_tokens, sampling=_GREEDY, eos_id=None)
    logits, state, seen = decoding.prefill()
    finish(logits)
    prefilled = first = clock()
    done = 0
    for event in decoding.decode(logits, state, seen):
        done += 1
        if done == 1:
            first = clock()
        if event.row == len(prompts) - 1:
            count(done)
    ended = clock()
    return DecodeRun(
        decoding.generated,
        max_new_tokens,
        prefilled - began,
        first - began,
        ended - first,
        ended - began,
        cache_bytes=state.n_bytes,
        cache_slots=state.capacity,
    )


@torch.inference_mode()
def _decode_uncached(
    engine: Engine,
    prompts: Prompts,
    given: Prompts,
    places: Sequence[int],
    clock: Clock,
    count: Callable[[int], None],
) -> DecodeRun:
    began = stamp = clock()
    model = engine.model
    length, n_new = len(prompts[0]), len(given[0])
    rows = [prompt + tokens for prompt, tokens in zip(prompts, given, strict=True)]
    sequence = torch.tensor(rows).to(model.embedding.weight.device)
    generated: Prompts = [[] for _ in prompts]
    prefilled = began
    seconds = []
    for number, place in enumerate(places, start=1):
        logits = model.logits(model.hidden_states(sequence[:, : length + place])[:, -1])
        if place == 0:
            finish(logits)
            prefilled = clock()
        for row, token in zip(generated, next_tokens(logits, _GREEDY, None).tolist(), strict=True):
            row.append(token)
        now = clock()
        seconds.append(now - stamp)
        stamp = now
        count(number * len(prompts))
    decode_s = float(np.interp(np.arange(1, n_new), places[1:], seconds[1:]).sum())
    first_s = seconds[0]
    return DecodeRun(generated, n_new, prefilled - began, first_s, decode_s, first_s + decode_s, places=tuple(places))


def finish(tensor: torch.Tensor) -> None:
    """Wait until the GPU has computed ``tensor``; calls return earlier than that."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)

"""Decoding modes: greedy continuations, and the times of prefill, first token and decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from psannlm.benchmarks.decoding.modes import Case, DecodeRun, decode, decode_uncached, spread_places
from psannlm.generation.engine import Engine
from psannlm.models.kv_cache import KVCache
from psannlm.models.transformer import Transformer

PROMPTS = [[3, 1, 4], [1, 5, 9]]


class FakeClock:
    """Time that passes by one second for every token position that is asked of the engine, cached or not."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        hidden_states, prefill, step = engine.model.hidden_states, engine.prefill, engine.forward_tokens

        def slow_hidden_states(input_ids: Tensor, *rest: Any, **named: Any) -> Tensor:
            now = self.now
            computed = hidden_states(input_ids, *rest, **named)
            self.now = now + input_ids.numel()
            return computed

        def slow_prefill(prompts: Sequence[Sequence[int]], *rest: Any, **named: Any) -> tuple[Tensor, KVCache]:
            now = self.now
            computed = prefill(prompts, *rest, **named)
            self.now = now + sum(map(len, prompts))
            return computed

        def slow_step(tokens: Tensor, *rest: Any, **named: Any) -> Tensor:
            now = self.now
            computed = step(tokens, *rest, **named)
            self.now = now + tokens.numel()
            return computed

        monkeypatch.setattr(engine.model, "hidden_states", slow_hidden_states)
        monkeypatch.setattr(engine, "prefill", slow_prefill)
        monkeypatch.setattr(engine, "forward_tokens", slow_step)

    def __call__(self) -> float:
        return self.now


def greedy(model: Transformer, prompt: list[int], n_new: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n_new):
            ids.append(int(model.logits(model.hidden_states(torch.tensor([ids])))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("is_batched", [True, False])
def test_cached_and_uncached_decode_greedily(is_batched: bool, build_tiny: Callable[..., Transformer]) -> None:
    model = build_tiny(seed=3)
    engine = Engine(model)
    expected = [greedy(model, prompt, 6) for prompt in PROMPTS]
    cached = decode(engine, PROMPTS, 6, is_batched=is_batched)
    uncached = decode_uncached(engine, PROMPTS, expected, is_batched=is_batched)
    assert cached.ids == uncached.ids == expected
    assert cached.cache_bytes > 0 == uncached.cache_bytes
    assert cached.cache_slots >= 3 + 5
    assert (cached.places, uncached.places) == (None, (0, 1, 2, 3, 4, 5))


def test_decode_uncached_follows_given_tokens(build_tiny: Callable[..., Transformer]) -> None:
    """A wrong token that was given is found at its place, and the choices after it stand on it."""
    model = build_tiny(seed=3)
    right = greedy(model, PROMPTS[0], 4)
    wrong = [right[0], (right[1] + 1) % 17, *right[2:]]
    run = decode_uncached(Engine(model), PROMPTS[:1], [wrong], is_batched=True)
    [choices] = run.ids
    assert choices[:2] == right[:2]
    assert choices[2] == greedy(model, PROMPTS[0] + wrong[:2], 1)[0]


@pytest.mark.parametrize(
    ("is_batched", "prefill", "first"),
    # 2 rows of 3 prompt tokens; one at a time, a row's first token comes 3 positions after its own start.
    [(True, 6, 6), (False, 6, 3)],
)
def test_decode_run_times_and_throughputs(
    is_batched: bool,
    prefill: int,
    first: int,
    build_tiny: Callable[..., Transformer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a cache every position is computed again, with one each position once: this is the definition."""
    engine = Engine(build_tiny())
    clock = FakeClock(engine, monkeypatch)
    counts: list[tuple[int, int]] = []

    def count(done: int, total: int) -> None:
        counts.append((done, total))

    cached = decode(engine, PROMPTS, 4, is_batched=is_batched, clock=clock, count=count)
    assert counts == sorted(counts)
    assert counts[-1] == (8, 8)
    counts.clear()
    uncached = decode_uncached(engine, PROMPTS, cached.ids, is_batched=is_batched, clock=clock, count=count)
    assert counts == sorted(counts)
    assert counts[-1] == (8, 8)
    # One position per row and token; whole sequences of 4, 5 and 6 tokens.
    for run, decoding in ((cached, 2 * 3), (uncached, 2 * (4 + 5 + 6))):
        assert (run.prefill_s, run.first_token_s, run.decode_s) == (prefill, first, decoding)
        assert run.total_s == prefill + decoding
        assert run.decode_tokens_per_s == pytest.approx(6 / decoding)
        assert run.tokens_per_s == pytest.approx(8 / (prefill + decoding))


@pytest.mark.parametrize("is_batched", [True, False])
def test_decode_uncached_interpolates_skipped_passes(
    is_batched: bool, build_tiny: Callable[..., Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a pass takes as long as its sequence has tokens, three of nine give the seconds of all, to the last."""
    engine = Engine(build_tiny())
    given = decode(engine, PROMPTS, 10, is_batched=True).ids
    clock = FakeClock(engine, monkeypatch)
    counts: list[tuple[int, int]] = []
    few, every = (
        decode_uncached(
            engine,
            PROMPTS,
            given,
            is_batched=is_batched,
            places=places,
            clock=clock,
            count=lambda done, total: counts.append((done, total)),
        )
        for places in ([0, 1, 4, 9], None)
    )
    assert few.decode_s == pytest.approx(every.decode_s)
    assert few.total_s == pytest.approx(every.total_s)
    assert few.tokens_per_s == pytest.approx(every.tokens_per_s)
    assert few.ids == [[row[place] for place in (0, 1, 4, 9)] for row in every.ids]
    assert (8, 8) in counts


def test_spread_places_includes_both_ends() -> None:
    assert spread_places(10, None) == list(range(10))
    assert spread_places(10, 9) == list(range(10))
    assert spread_places(10, 2) == [0, 1, 9]
    assert spread_places(10, 3) == [0, 1, 5, 9]
    assert spread_places(2, 2) == [0, 1]
    for n_steps in range(2, 30):
        places = spread_places(256, n_steps)
        assert len(places) == n_steps + 1
        gaps = [after - before for before, after in pairwise(places[1:])]
        assert max(gaps) - min(gaps) <= 1


def test_decode_run_join_keeps_row_order() -> None:
    rows = [
        DecodeRun([[1, 2]], 2, 1.0, 2.0, 3.0, 5.0, cache_bytes=10, cache_slots=4),
        DecodeRun([[3, 4]], 2, 3.0, 4.0, 5.0, 9.0, cache_bytes=12, cache_slots=5),
    ]
    joined = DecodeRun([[1, 2], [3, 4]], 2, 4.0, 3.0, 8.0, 14.0, cache_bytes=12, cache_slots=5)
    assert DecodeRun.join(rows) == joined
    assert joined.tokens_per_s == 4 / 14


def test_case_names() -> None:
    assert str(Case(True, False)) == "cache on, row by row"
    assert str(Case(True, True, True)) == "cache on, batch, compiled"

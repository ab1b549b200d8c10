"""KV cache: any split, batch and base gives the results of the full forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from psannlm.config.model import BaseName, ModelConfig, PositionKind
from psannlm.errors import GenerationError
from psannlm.models.accounting import cache_bytes, count_parameters
from psannlm.models.kv_cache import CACHE_BLOCK_TOKENS, KVCache, LayerCache, update_conv_states
from psannlm.models.registry import resolve
from psannlm.models.transformer import Transformer

Build = Callable[..., Transformer]
CPU = torch.device("cpu")
TOLERANCE = 1e-4


@st.composite
def model_settings(draw: st.DrawFn) -> dict[str, Any]:
    """Every base, position scheme and short convolution; grouped queries; odd head sizes where rope permits them."""
    position = draw(st.sampled_from(get_args(PositionKind)))
    n_heads = draw(st.sampled_from([1, 2, 3] if position == "rope" else [2, 4, 12]))
    return {
        "base": draw(st.sampled_from(get_args(BaseName))),
        "positional_encoding": position,
        "n_heads": n_heads,
        "n_kv_heads": draw(st.sampled_from([n for n in range(1, n_heads + 1) if n_heads % n == 0])),
        "short_conv": {
            "enabled": draw(st.booleans()),
            "kernel_size": draw(st.integers(1, 5)),
            "dilation_growth": draw(st.integers(1, 3)),
            "places": draw(st.sampled_from([("attention",), ("mlp",), ("attention", "mlp")])),
            "activation": draw(st.sampled_from(["none", "sine"])),
        },
    }


def tokens(n_rows: int, n_tokens: int) -> Tensor:
    return torch.randint(0, 17, (n_rows, n_tokens), generator=torch.Generator().manual_seed(n_tokens))


def new_state(model: Transformer, n_rows: int, capacity: int) -> KVCache:
    return KVCache.allocate(model.config, n_rows, capacity, CPU, torch.float32)


def logits_of(model: Transformer, input_ids: Tensor, *state: Any) -> Tensor:
    return model.logits(model.hidden_states(input_ids, *state))


@pytest.mark.slow
@given(config=model_settings(), chunks=st.lists(st.integers(1, 7), min_size=1, max_size=6), spare=st.integers(0, 3))
@settings(deadline=None, max_examples=120)
@torch.no_grad()
def test_kv_cache_chunked_prefill_matches_full_forward(
    build_tiny: Build, config: dict[str, Any], chunks: list[int], spare: int
) -> None:
    model = build_tiny(**config)
    input_ids = tokens(2, sum(chunks))
    state = new_state(model, 2, sum(chunks) + spare)
    parts = [logits_of(model, chunk, state) for chunk in input_ids.split(chunks, dim=1)]
    assert state.lengths == [sum(chunks)] * 2
    torch.testing.assert_close(torch.cat(parts, dim=1), logits_of(model, input_ids), rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@given(
    config=model_settings(),
    chunks=st.lists(st.tuples(*[st.integers(0, 4)] * 3).filter(any), min_size=1, max_size=5),
)
@settings(deadline=None, max_examples=120)
@torch.no_grad()
def test_kv_cache_ragged_rows_match_single_rows(
    build_tiny: Build, config: dict[str, Any], chunks: list[tuple[int, int, int]]
) -> None:
    model = build_tiny(**config)
    totals = [sum(n) for n in zip(*chunks, strict=True)]
    rows = tokens(3, max(totals))
    state = new_state(model, 3, max(totals) + 4)
    done = [0, 0, 0]
    found: list[list[Tensor]] = [[], [], []]
    for n_new in chunks:
        # Padded on the right with a token that would be seen if it were taken for text.
        input_ids = torch.full((3, max(n_new)), 16)
        for row, n in enumerate(n_new):
            input_ids[row, :n] = rows[row, done[row] : done[row] + n]
        logits = logits_of(model, input_ids, state, n_new)
        for row, n in enumerate(n_new):
            found[row].append(logits[row, :n])
            done[row] += n
    assert state.lengths == totals
    for row, total in enumerate(totals):
        if total:
            alone = logits_of(model, rows[row : row + 1, :total])[0]
            torch.testing.assert_close(torch.cat(found[row]), alone, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@given(config=model_settings(), rows=st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
@settings(deadline=None, max_examples=60)
@torch.no_grad()
def test_kv_cache_selected_rows_continue_unchanged(build_tiny: Build, config: dict[str, Any], rows: list[int]) -> None:
    model = build_tiny(**config)
    lengths = [6, 2, 5, 3]
    input_ids = tokens(4, 10)
    state = new_state(model, 4, 10)
    model.hidden_states(input_ids[:, :6], state, lengths)
    kept = state.select(rows)
    assert kept.lengths == [lengths[row] for row in rows]
    assert kept.capacity == 10
    following = torch.stack([input_ids[row, lengths[row] : lengths[row] + 3] for row in rows])
    found = torch.cat([logits_of(model, chunk, kept) for chunk in following.split([1, 2], dim=1)], dim=1)
    for place, row in enumerate(rows):
        alone = logits_of(model, input_ids[row : row + 1, : lengths[row] + 3])[0, -3:]
        torch.testing.assert_close(found[place], alone, rtol=0, atol=TOLERANCE)
    # The state they came from has not moved.
    assert state.lengths == lengths


def held(state: KVCache) -> list[Tensor]:
    return [tensor for layer in state.layers for tensor in vars(layer).values() if tensor is not None]


@pytest.mark.parametrize("n_new", [None, [1, 3], [3, 1]])
@torch.no_grad()
def test_kv_cache_full_raises_and_is_unchanged(build_tiny: Build, n_new: list[int] | None) -> None:
    model = build_tiny()
    state = new_state(model, 2, 6)
    model.hidden_states(tokens(2, 4), state)
    before = [t.clone() for t in held(state)]
    with pytest.raises(GenerationError, match=r"row \d: 4 \+ 3 tokens exceed the cache of 6"):
        model.hidden_states(tokens(2, 3), state, n_new)
    assert state.lengths == [4, 4]
    assert all(torch.equal(a, b) for a, b in zip(before, held(state), strict=True))
    model.hidden_states(tokens(2, 2), state)
    assert state.lengths == [6, 6]


@pytest.mark.slow
@given(
    config=model_settings(),
    n_seen=st.integers(0, 6),
    n_uncommitted=st.integers(1, 7),
    kept=st.tuples(*[st.integers(0, 7)] * 3),
)
@settings(deadline=None, max_examples=150)
@torch.no_grad()
def test_kv_cache_uncommitted_tokens_leave_no_trace(
    build_tiny: Build, config: dict[str, Any], n_seen: int, n_uncommitted: int, kept: tuple[int, int, int]
) -> None:
    model = build_tiny(**config)
    kept_by_row = [min(n, n_uncommitted) for n in kept]
    rows, following = tokens(3, n_seen + n_uncommitted), tokens(3, 3)
    state = new_state(model, 3, 20)
    if n_seen:
        model.hidden_states(rows[:, :n_seen], state)
    before = [conv_state.clone() for layer in state.layers for conv_state in conv_states(layer)]
    model.forward_uncommitted(rows[:, n_seen:], state)
    # Nothing is counted, and no conv_state moves, until it is known what stays.
    assert state.lengths == state.offsets.tolist() == [n_seen] * 3
    now = [conv_state for layer in state.layers for conv_state in conv_states(layer)]
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    state.commit(kept_by_row)
    assert state.lengths == state.offsets.tolist() == [n_seen + n for n in kept_by_row]
    going_on = logits_of(model, following, state.select(range(3)))
    for row, n in enumerate(kept_by_row):
        alone = new_state(model, 1, 20)
        if n_seen:
            model.hidden_states(rows[row : row + 1, :n_seen], alone)
        if n:
            model.hidden_states(rows[row : row + 1, n_seen : n_seen + n], alone)
        for mine, its_own in zip(state.layers, alone.layers, strict=True):
            for conv_state, wanted in zip(conv_states(mine), conv_states(its_own), strict=True):
                torch.testing.assert_close(conv_state[row], wanted[0], rtol=0, atol=TOLERANCE)
            kv_len = n_seen + n
            torch.testing.assert_close(mine.keys[row, :, :kv_len], its_own.keys[0, :, :kv_len], rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(
                mine.values[row, :, :kv_len], its_own.values[0, :, :kv_len], rtol=0, atol=TOLERANCE
            )
        wanted = logits_of(model, following[row : row + 1], alone)[0]
        torch.testing.assert_close(going_on[row], wanted, rtol=0, atol=TOLERANCE)


def conv_states(layer: LayerCache) -> list[Tensor]:
    return [conv_state for conv_state in (layer.attn_conv_state, layer.mlp_conv_state) if conv_state is not None]


@given(
    n_new=st.lists(st.integers(0, 6), min_size=2, max_size=4),
    length=st.integers(0, 5),
    keep_all=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_kv_cache_conv_state_ends_with_its_row(n_new: list[int], length: int, keep_all: bool) -> None:
    n_rows = len(n_new)
    inputs = torch.randn(n_rows, length + 6, 3, generator=torch.Generator().manual_seed(0))
    keys = torch.zeros(n_rows, 1, 8, 3)
    for place in ("attn", "mlp"):
        layer = LayerCache(keys, keys, None, None)
        setattr(layer, f"{place}_conv_state", inputs[:, :length].clone())
        setattr(layer, f"{place}_conv_inputs", inputs)
        update_conv_states(layer, None if keep_all else n_new)
        for row, n in enumerate(n_new):
            end = length + (6 if keep_all else n)
            assert torch.equal(getattr(layer, f"{place}_conv_state")[row], inputs[row, end - length : end])
        assert layer.attn_conv_inputs is layer.mlp_conv_inputs is None


@pytest.mark.slow
@given(
    config=model_settings(),
    lengths=st.tuples(*[st.integers(1, 6)] * 4),
    new_lengths=st.tuples(*[st.integers(1, 40)] * 2),
    places=st.permutations(range(4)).map(lambda order: order[:2]),
)
@settings(deadline=None, max_examples=80)
@torch.no_grad()
def test_kv_cache_copied_rows_continue_as_alone(
    build_tiny: Build,
    config: dict[str, Any],
    lengths: tuple[int, ...],
    new_lengths: tuple[int, int],
    places: list[int],
) -> None:
    model = build_tiny(**config)
    rows, newcomers = tokens(4, 12), tokens(2, 45)
    state, other = new_state(model, 4, 12), new_state(model, 2, 45)
    model.hidden_states(rows[:, :6], state, lengths)
    model.hidden_states(newcomers[:, : max(new_lengths)], other, new_lengths)
    state.copy_rows_(places, other)
    texts = [rows[row, :n].tolist() for row, n in enumerate(lengths)]
    for place, text, n in zip(places, newcomers, new_lengths, strict=True):
        texts[place] = text[:n].tolist()
    assert state.lengths == state.offsets.tolist() == [len(text) for text in texts]
    assert other.lengths == list(new_lengths)
    following = tokens(4, 3)
    state.grow(max(state.lengths) + 3)
    found = torch.cat([logits_of(model, chunk, state) for chunk in following.split([1, 2], dim=1)], dim=1)
    for row, text in enumerate(texts):
        alone = logits_of(model, torch.tensor([[*text, *following[row].tolist()]]))[0, -3:]
        torch.testing.assert_close(found[row], alone, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@given(config=model_settings(), start=st.integers(1, 70), chunks=st.lists(st.integers(1, 50), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
@torch.no_grad()
def test_kv_cache_grown_equals_preallocated(
    build_tiny: Build, config: dict[str, Any], start: int, chunks: list[int]
) -> None:
    model = build_tiny(**config, max_seq_len=400)
    total = start + sum(chunks)
    input_ids = tokens(2, total)
    grown, large = new_state(model, 2, start), new_state(model, 2, total)
    for state in (grown, large):
        model.hidden_states(input_ids[:, :start], state)
    for chunk in input_ids[:, start:].split(chunks, dim=1):
        before = grown.capacity
        grown.grow(grown.lengths[0] + chunk.shape[1])
        if grown.capacity != before:
            assert grown.capacity % CACHE_BLOCK_TOKENS == 0
            assert grown.capacity >= min(before * 3 // 2, grown.lengths[0] + chunk.shape[1])
        assert grown.n_bytes == cache_bytes(model.config, 2, grown.capacity)
        torch.testing.assert_close(
            logits_of(model, chunk, grown), logits_of(model, chunk, large), rtol=0, atol=TOLERANCE
        )
    before = grown.capacity
    grown.grow(total)
    assert grown.capacity == before >= total


@pytest.mark.slow
@given(config=model_settings(), n_rows=st.integers(1, 4), capacity=st.integers(1, 20))
@settings(deadline=None, max_examples=60)
@torch.no_grad()
def test_kv_cache_bytes_match_estimate(build_tiny: Build, config: dict[str, Any], n_rows: int, capacity: int) -> None:
    model = build_tiny(**config)
    state = new_state(model, n_rows, capacity)
    assert state.n_bytes == cache_bytes(model.config, n_rows, capacity)
    half = KVCache.allocate(model.config, n_rows, capacity, CPU, torch.bfloat16)
    assert half.n_bytes == cache_bytes(model.config, n_rows, capacity, bytes_per_element=2)
    model.hidden_states(tokens(n_rows, capacity), state)
    assert state.n_bytes == cache_bytes(model.config, n_rows, capacity)


def test_cache_bytes_known_values() -> None:
    config = ModelConfig(
        d_model=12,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        positional_encoding="alibi",
        short_conv={"enabled": True, "kernel_size": 4, "dilation_growth": 2},
    )
    # Keys and values: 2 x 3 layers x 2 groups x head size 3 x 10 slots. Tails: 2 places x width 12 x 3 (1 + 2 + 4).
    assert cache_bytes(config, batch_size=5, capacity=10) == 5 * 4 * (2 * 3 * 2 * 3 * 10 + 2 * 12 * 21)


@pytest.mark.parametrize("places", [(), ("mlp",), ("mlp", "mlp", "attention")])
def test_kv_cache_bytes_estimate_ignores_duplicate_places(places: tuple[str, ...], build_tiny: Build) -> None:
    model = build_tiny(short_conv={"places": places})
    state = KVCache.allocate(model.config, 2, 5, CPU, torch.float32)
    assert state.n_bytes == cache_bytes(model.config, 2, 5)


def test_kv_cache_of_64_default_rows_fits_24_gb() -> None:
    config = resolve(ModelConfig(vocab_size=4096))
    cache = cache_bytes(config, batch_size=64, capacity=2048)
    # Keys and values: 2 x 8 layers x width 512 x 2,048 slots. Tails: 2 places x 8 layers x width 512 x 3.
    assert cache == 64 * 4 * (2 * 8 * 512 * 2048 + 2 * 8 * 512 * 3)
    weights = 4 * sum(count_parameters(config).values())
    assert cache + 2 * weights < 24e9  # the model, and its prepared copy

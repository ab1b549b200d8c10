"""A cache changes nothing but the time: any split, any company, any base equals the full forward pass."""

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
from psannlm.models.accounting import cache_bytes
from psannlm.models.cache import DecodeState
from psannlm.models.transformer import Transformer

Build = Callable[..., Transformer]
CPU = torch.device("cpu")
TOLERANCE = 1e-4


@st.composite
def model_settings(draw: st.DrawFn) -> dict[str, Any]:
    """Every base, position scheme and wave; grouped queries; odd head sizes where rope does not forbid them."""
    position = draw(st.sampled_from(get_args(PositionKind)))
    n_heads = draw(st.sampled_from([1, 2, 3] if position == "rope" else [2, 4, 12]))
    return {
        "base": draw(st.sampled_from(get_args(BaseName))),
        "positional_encoding": position,
        "n_heads": n_heads,
        "n_kv_heads": draw(st.sampled_from([n for n in range(1, n_heads + 1) if n_heads % n == 0])),
        "wave": {
            "enabled": draw(st.booleans()),
            "kernel_size": draw(st.integers(1, 5)),
            "dilation_growth": draw(st.integers(1, 3)),
            "places": draw(st.sampled_from([("attention",), ("mlp",), ("attention", "mlp")])),
            "activation": draw(st.sampled_from(["none", "sine"])),
        },
    }


def tokens(n_rows: int, n_tokens: int) -> Tensor:
    return torch.randint(0, 17, (n_rows, n_tokens), generator=torch.Generator().manual_seed(n_tokens))


def new_state(model: Transformer, n_rows: int, capacity: int) -> DecodeState:
    return DecodeState.allocate(model.config, n_rows, capacity, CPU, torch.float32)


def logits_of(model: Transformer, input_ids: Tensor, *state: Any) -> Tensor:
    return model.logits(model.hidden_states(input_ids, *state))


@given(config=model_settings(), chunks=st.lists(st.integers(1, 7), min_size=1, max_size=6), spare=st.integers(0, 3))
@settings(deadline=None, max_examples=120)
@torch.no_grad()
def test_any_split_equals_the_full_forward(
    build_tiny: Build, config: dict[str, Any], chunks: list[int], spare: int
) -> None:
    model = build_tiny(**config)
    input_ids = tokens(2, sum(chunks))
    state = new_state(model, 2, sum(chunks) + spare)
    parts = [logits_of(model, chunk, state) for chunk in input_ids.split(chunks, dim=1)]
    assert state.lengths == [sum(chunks)] * 2
    torch.testing.assert_close(torch.cat(parts, dim=1), logits_of(model, input_ids), rtol=0, atol=TOLERANCE)


@given(
    config=model_settings(),
    chunks=st.lists(st.tuples(*[st.integers(0, 4)] * 3).filter(any), min_size=1, max_size=5),
)
@settings(deadline=None, max_examples=120)
@torch.no_grad()
def test_rows_of_any_length_equal_the_same_rows_alone(
    build_tiny: Build, config: dict[str, Any], chunks: list[tuple[int, int, int]]
) -> None:
    model = build_tiny(**config)
    totals = [sum(n) for n in zip(*chunks, strict=True)]
    rows = tokens(3, max(totals))
    state = new_state(model, 3, max(totals))
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


@given(config=model_settings(), rows=st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
@settings(deadline=None, max_examples=60)
@torch.no_grad()
def test_selected_rows_go_on_as_before(build_tiny: Build, config: dict[str, Any], rows: list[int]) -> None:
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


def held(state: DecodeState) -> list[Tensor]:
    return [tensor for layer in state.layers for tensor in vars(layer).values()]


@pytest.mark.parametrize("n_new", [None, [1, 3], [3, 1]])
@torch.no_grad()
def test_a_full_cache_raises_and_stays_as_it_was(build_tiny: Build, n_new: list[int] | None) -> None:
    model = build_tiny()
    state = new_state(model, 2, 6)
    model.hidden_states(tokens(2, 4), state)
    before = [t.clone() for t in held(state)]
    with pytest.raises(GenerationError, match=r"row \d: 4 \+ 3 tokens exceed the cache of 6"):
        model.hidden_states(tokens(2, 3), state, n_new)
    assert state.lengths == [4, 4]
    assert all(
        torch.equal(a, b) for a, b in zip(before, [t for s in state.layers for t in vars(s).values()], strict=True)
    )
    model.hidden_states(tokens(2, 2), state)
    assert state.lengths == [6, 6]


@given(config=model_settings(), n_rows=st.integers(1, 4), capacity=st.integers(1, 20))
@settings(deadline=None, max_examples=60)
@torch.no_grad()
def test_bytes_held_are_the_bytes_foretold(
    build_tiny: Build, config: dict[str, Any], n_rows: int, capacity: int
) -> None:
    model = build_tiny(**config)
    state = new_state(model, n_rows, capacity)
    assert state.n_bytes == cache_bytes(model.config, n_rows, capacity)
    half = DecodeState.allocate(model.config, n_rows, capacity, CPU, torch.bfloat16)
    assert half.n_bytes == cache_bytes(model.config, n_rows, capacity, bytes_per_element=2)
    model.hidden_states(tokens(n_rows, capacity), state)
    assert state.n_bytes == cache_bytes(model.config, n_rows, capacity)


def test_bytes_worked_by_hand() -> None:
    config = ModelConfig(
        d_model=12,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        positional_encoding="alibi",
        wave={"enabled": True, "kernel_size": 4, "dilation_growth": 2},
    )
    # Keys and values: 2 x 3 layers x 2 groups x head size 3 x 10 slots. Tails: 2 places x width 12 x 3 (1 + 2 + 4).
    assert cache_bytes(config, batch_size=5, capacity=10) == 5 * 4 * (2 * 3 * 2 * 3 * 10 + 2 * 12 * 21)


@pytest.mark.parametrize("places", [(), ("mlp",), ("mlp", "mlp", "attention")])
def test_the_bytes_predicted_are_those_held_however_places_are_written(
    places: tuple[str, ...], build_tiny: Build
) -> None:
    model = build_tiny(wave={"places": places})
    state = DecodeState.allocate(model.config, 2, 5, CPU, torch.float32)
    assert state.n_bytes == cache_bytes(model.config, 2, 5)

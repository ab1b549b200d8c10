"""Sampling of the next token: known values of each cut, the penalty, and the distribution of draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from psannlm.errors import GenerationError
from psannlm.generation.requests import SamplingConfig
from psannlm.generation.sampling import keep_min_p, keep_top_k, keep_top_p, next_tokens, penalise_repetition

BELOW_ONE = 1.0 - 2.0**-24  # the largest float32 that torch.rand gives


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log().float()


def kept(logits: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in torch.isfinite(logits)]


@pytest.mark.parametrize(
    ("p", "tokens"),
    [
        (0.3, [1]),  # the first alone crosses, and stays alone
        (0.45, [1, 3]),  # 0.4 is below it, so 0.3 crosses and stays
        (0.65, [1, 3]),
        (0.75, [0, 1, 3]),
        (0.95, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
        (1e-9, [1]),
    ],
)
def test_top_p_known_values(p: float, tokens: list[int]) -> None:
    logits = logits_of(0.2, 0.4, 0.1, 0.3)
    found = keep_top_p(logits, p)
    assert kept(found) == [tokens]
    assert torch.equal(found[0, tokens], logits[0, tokens])


def test_top_p_per_row_breaks_ties_by_id() -> None:
    logits = torch.cat((logits_of(0.9, 0.05, 0.03, 0.02), logits_of(0.25, 0.25, 0.25, 0.25)))
    assert kept(keep_top_p(logits, 0.4)) == [[0], [0, 1]]


def test_top_p_one_keeps_every_token() -> None:
    # In float32 the probabilities of 100,000 equal tokens sum to more than 1 before the last is counted.
    logits = torch.zeros(1, 100_000)
    assert len(kept(keep_top_p(logits, 1.0))[0]) == 100_000
    # Nor is one lost whose probability the sum of the others swallows.
    assert kept(keep_top_p(torch.tensor([[0.0, -50.0]]), 1.0)) == [[0, 1]]
    sampling = SamplingConfig(top_p=1.0)
    assert next_tokens(logits, sampling, torch.tensor([BELOW_ONE])).item() == 99_999
    # The same sum decides where the nucleus ends.
    assert len(kept(keep_top_p(logits, 0.5))[0]) == pytest.approx(50_000, abs=1)


@pytest.mark.parametrize(
    ("k", "tokens"),
    [(1, [2]), (2, [0, 2, 4]), (3, [0, 2, 4]), (4, [0, 1, 2, 4]), (5, [0, 1, 2, 3, 4]), (99, [0, 1, 2, 3, 4])],
)
def test_top_k_keeps_ties(k: int, tokens: list[int]) -> None:
    assert kept(keep_top_k(torch.tensor([[2.0, 1.0, 3.0, 0.0, 2.0]]), k)) == [tokens]


def test_repetition_penalty_respects_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 0.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, True, False, False]])
    assert penalise_repetition(logits, seen, 4.0).tolist() == [[0.5, -8.0, 0.0, 2.0, -2.0]]
    assert penalise_repetition(logits, seen, 0.5).tolist() == [[4.0, -1.0, 0.0, 2.0, -2.0]]
    assert torch.equal(penalise_repetition(logits, seen, 1.0), logits)


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.01, 0.05, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_min_p_equals_its_definition_in_float64(p: float, temperature: float) -> None:
    logits = torch.randn(20, 60, generator=torch.Generator().manual_seed(0)) * 3
    scaled = logits.double() / temperature
    for row, found in enumerate(kept(keep_min_p(logits / temperature, p))):
        most = float(scaled[row].exp().max())
        # A token at the threshold itself may fall on either side of it, by rounding.
        ratios = [float(value) / most for value in scaled[row].exp()]
        assert {t for t, ratio in enumerate(ratios) if ratio > p * (1 + 1e-6)} <= {*found}
        assert {*found} <= {t for t, ratio in enumerate(ratios) if ratio > p * (1 - 1e-6)}
        assert scaled[row].argmax() in found
    # The cut is that of the distribution which is drawn from.
    candidates = kept(keep_min_p(logits / temperature, p))
    for u in (0.0, 0.3, 0.7, BELOW_ONE):
        drawn = next_tokens(logits, SamplingConfig(temperature, top_p=None, min_p=p), torch.full((20,), u))
        assert all(int(token) in row for token, row in zip(drawn, candidates, strict=True))


def test_min_p_keeps_ties_and_cut_tokens_out() -> None:
    assert kept(keep_min_p(torch.tensor([[1.0, 1.0, 0.999]]), 1.0)) == [[0, 1]]
    assert kept(keep_min_p(torch.tensor([[1.0, float("-inf"), 0.5]]), 0.1)) == [[0, 2]]


def test_repetition_penalty_changes_greedy_choice() -> None:
    logits, seen = torch.tensor([[3.0, 2.0]]), torch.tensor([[True, False]])
    greedy = SamplingConfig(temperature=0.0, repetition_penalty=2.0)
    assert next_tokens(logits, greedy, None, seen).tolist() == [1]
    assert next_tokens(logits, SamplingConfig(temperature=0.0), None, seen).tolist() == [0]
    # 3 / 2 = 1.5 against 2: at temperature 0.1 the odds are exp(-5) to 1. A penalty on logits that were shifted to have
    # their highest at 0 would find 0 and -1, and leave the order as it was.
    at = 1.0 / (1.0 + math.exp(5.0))
    cold = SamplingConfig(temperature=0.1, top_p=None, repetition_penalty=2.0)
    assert next_tokens(logits, cold, torch.tensor([at * 0.99]), seen).tolist() == [0]
    assert next_tokens(logits, cold, torch.tensor([at * 1.01]), seen).tolist() == [1]


def test_temperature_zero_is_greedy_despite_cuts() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.9], [7.0, 7.0, 1.0]])
    for other in ({}, {"top_k": 1}, {"top_p": 0.01}, {"seed": 3}):
        sampling = SamplingConfig(temperature=0.0, **other)
        assert next_tokens(logits, sampling, None).tolist() == [1, 0]
        assert next_tokens(logits, sampling, torch.tensor([0.99, 0.99])).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-45, 5e-324])
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_temperature_tiny_is_greedy(temperature: float, scale: float) -> None:
    logits = torch.tensor([[1.0, 3.0, -2.0, 2.9]]) * scale
    for u in (0.0, 0.5, BELOW_ONE):
        sampling = SamplingConfig(temperature=temperature, top_p=None)
        assert next_tokens(logits, sampling, torch.tensor([u])).tolist() == [1]


def test_temperature_huge_is_uniform() -> None:
    logits = torch.tensor([[50.0, -50.0, 0.0, 20.0]]).repeat(4, 1)
    uniforms = torch.tensor([0.1, 0.3, 0.6, 0.9])
    assert next_tokens(logits, SamplingConfig(temperature=1e30, top_p=None), uniforms).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("temperature", [5e-324, 1e39, 1e308])
@pytest.mark.parametrize("penalty", [None, 5e-324, 1e39, 1e308])
def test_sampling_extreme_settings_choose_allowed_tokens(temperature: float, penalty: float | None) -> None:
    logits = torch.tensor([[0.0, 50.0, -50.0, 0.0, 20.0]]).repeat(3, 1)
    seen = torch.tensor([True, True, True, False, False]).repeat(3, 1)
    sampling = SamplingConfig(temperature=temperature, top_p=0.9, min_p=0.0, repetition_penalty=penalty)
    chosen = next_tokens(logits, sampling, torch.tensor([0.0, 0.5, BELOW_ONE]), seen, torch.tensor([4]))
    assert set(chosen.tolist()) <= {0, 1, 2, 3}


def test_sampling_inverts_cumulative_distribution() -> None:
    logits = logits_of(0.1, 0.2, 0.3, 0.4)
    for u, token in ((0.0, 0), (0.0999, 0), (0.1001, 1), (0.2999, 1), (0.3001, 2), (0.6001, 3), (BELOW_ONE, 3)):
        assert next_tokens(logits, SamplingConfig(top_p=None), torch.tensor([u])).tolist() == [token], u


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_softmax(temperature: float) -> None:
    n_draws = 40_000
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 1.5
    uniforms = torch.rand(n_draws, generator=torch.Generator().manual_seed(1))
    sampling = SamplingConfig(temperature=temperature, top_p=None)
    drawn = next_tokens(logits.expand(n_draws, -1), sampling, uniforms).bincount(minlength=12).double()
    expected = (logits.double() / temperature).softmax(0) * n_draws
    chi_square = ((drawn - expected) ** 2 / expected).sum().item()
    assert chi_square < 31.3  # 11 degrees of freedom: exceeded once in a thousand seeds


# One itself too, which no generator promises to give and rounding on the way may make.
@pytest.mark.parametrize("u", [0.0, 1e-30, 0.5, BELOW_ONE, 1.0])
def test_sampling_never_draws_zero_probability(u: float) -> None:
    # Zero probability at both ends and in the middle.
    logits = torch.tensor([[-1e30, 1.0, -1e30, 1.0, -1e30]])
    for sampling in (SamplingConfig(top_p=None), SamplingConfig(top_k=2, top_p=1.0), SamplingConfig(top_p=0.9)):
        assert next_tokens(logits, sampling, torch.tensor([u])).item() in (1, 3)
    ranked = torch.tensor([[0.0, 1.0, 0.5, -0.5]])
    assert next_tokens(ranked, SamplingConfig(top_k=1), torch.tensor([u])).item() == 1
    assert next_tokens(ranked, SamplingConfig(top_k=2, top_p=None), torch.tensor([u])).item() in (1, 2)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e38])
def test_sampling_never_takes_forbidden_token(temperature: float) -> None:
    logits, forbidden = torch.tensor([[9.0, 1.0, 8.0, 0.0]]), torch.tensor([0, 2])
    seen = torch.ones(1, 4, dtype=torch.bool)
    for penalty in (None, 1e-20, 1e20):
        sampling = SamplingConfig(temperature, top_p=None, repetition_penalty=penalty)
        for u in (0.0, 0.3, BELOW_ONE):
            assert next_tokens(logits, sampling, torch.tensor([u]), seen, forbidden).item() in (1, 3)


@given(
    logits=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8),
    temperature=st.floats(0.0, 1e38),
    top_k=st.none() | st.integers(1, 10),
    top_p=st.none() | st.floats(0.0, 1.0, exclude_min=True),
    penalty=st.none() | st.floats(1e-20, 1e20),
    u=st.floats(0.0, BELOW_ONE, width=32),
)
@settings(deadline=None, max_examples=300)
def test_sampling_any_valid_config_gives_valid_token(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None, penalty: float | None, u: float
) -> None:
    sampling = SamplingConfig(temperature, top_k, top_p, penalty)
    row = torch.tensor([logits])
    token = next_tokens(row, sampling, torch.tensor([u]), torch.ones_like(row, dtype=torch.bool))
    assert token.dtype == torch.int64
    assert 0 <= token.item() < len(logits)
    if top_k == 1 and penalty is None:
        assert logits[int(token)] == max(logits)


def test_sampling_rows_are_independent() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, uniforms = torch.randn(6, 20, generator=generator), torch.rand(6, generator=generator)
    seen = torch.rand(6, 20, generator=generator) < 0.3
    sampling = SamplingConfig(temperature=0.8, top_k=9, top_p=0.8, repetition_penalty=1.3)
    together = next_tokens(logits, sampling, uniforms, seen)
    alone = [next_tokens(logits[r : r + 1], sampling, uniforms[r : r + 1], seen[r : r + 1]) for r in range(6)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("damage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_nonfinite_logits_raise(damage: float, temperature: float) -> None:
    with pytest.raises(GenerationError, match="not finite"):
        next_tokens(torch.tensor([[0.0, damage]]), SamplingConfig(temperature), torch.tensor([0.5]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_sampling_accepts_any_floating_dtype(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]], dtype=dtype)
    assert next_tokens(logits, SamplingConfig(temperature=0.0), None).tolist() == [1]
    assert next_tokens(logits, SamplingConfig(temperature=0.01), torch.tensor([0.9])).tolist() == [1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", v) for v in (-0.1, math.nan, math.inf, -math.inf)],
        *[("top_k", v) for v in (0, -3)],
        *[("top_p", v) for v in (0.0, -0.5, 1.0001, math.nan)],
        *[("repetition_penalty", v) for v in (0.0, -1.0, math.nan, math.inf)],
        *[("seed", v) for v in (-1, 2**63)],
    ],
)
def test_sampling_config_error_names_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(GenerationError, match=f"{field} {value}"):
        SamplingConfig(**{field: value})


def test_sampling_without_random_numbers_raises() -> None:
    with pytest.raises(ValueError, match="random number"):
        next_tokens(torch.zeros(1, 3), SamplingConfig(), None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("temperature", None),
        ("temperature", True),
        ("top_k", 2.5),
        ("top_k", "3"),
        ("top_k", True),
        ("top_p", "most"),
        ("repetition_penalty", [1.2]),
        ("seed", 1.0),
        ("seed", "x" * 5000),
    ],
)
def test_sampling_config_wrong_type_raises(name: str, value: Any) -> None:
    with pytest.raises(GenerationError, match=rf"^{name} .* is not a (whole )?number$") as caught:
        SamplingConfig(**{name: value})
    assert repr(value)[:40] in str(caught.value)
    assert len(str(caught.value)) < 120


def test_sampling_config_accepts_numpy_and_whole_numbers() -> None:
    sampling = SamplingConfig(np.float32(0.5), np.int64(3), np.float64(0.9), 1, np.uint32(7))
    assert next_tokens(torch.zeros(1, 4), sampling, torch.tensor([0.0])).shape == (1,)
    assert SamplingConfig(temperature=1).temperature == 1

"""Token parity: every difference between decoding modes is found, and only rounding makes a tie."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from psannlm.benchmarks.decoding.modes import DecodeRun, decode
from psannlm.benchmarks.decoding.token_parity import FULL_PASS, Rounding, compare, new_logits
from psannlm.generation.engine import Engine
from psannlm.models.transformer import Transformer

PROMPTS = [[3, 1, 4], [1, 5, 9]]


@pytest.fixture
def model(build_tiny: Callable[..., Transformer]) -> Transformer:
    return build_tiny(seed=3)


@pytest.fixture
def right(model: Transformer) -> list[list[int]]:
    return decode(Engine(model), PROMPTS, 6, is_batched=True).ids


def run(ids: list[list[int]], places: tuple[int, ...] | None = None) -> DecodeRun:
    return DecodeRun(ids, 6, 1.0, 1.0, 1.0, 1.0, places)


def changed(ids: list[list[int]], row: int, place: int) -> list[list[int]]:
    copy = [list(tokens) for tokens in ids]
    copy[row][place] = (copy[row][place] + 1) % 17
    return copy


def pick(ids: list[list[int]], places: tuple[int, ...]) -> list[list[int]]:
    return [[row[place] for place in places] for row in ids]


class Loose(Rounding):
    """A tolerance that a test chooses."""

    def __init__(self, tolerance: float) -> None:
        object.__setattr__(self, "_tolerance", tolerance)

    def tolerance(self, prompt: object, ids: object) -> float:
        found: float = self._tolerance  # type: ignore[attr-defined]
        return found


def test_compare_accepts_equal_runs(model: Transformer, right: list[list[int]]) -> None:
    found = compare(model, PROMPTS, {"A": [run(right)] * 2, "B": [run(pick(right, (0, 3)), (0, 3))]})
    assert found.difference is None
    assert (found.tied_places, found.largest_tie, found.largest_tolerance) == (0, 0.0, 0.0)
    assert found.n_checked == 12 + 12 + 4


def test_compare_checks_first_run_with_full_pass(model: Transformer, right: list[list[int]]) -> None:
    """All ways may be wrong alike."""
    wrong = run(changed(right, 1, 5))
    found = compare(model, PROMPTS, {"A": [wrong], "B": [wrong]}).difference
    assert found is not None
    assert (found.row, found.place, found.first, found.second) == (1, 5, "A", FULL_PASS)
    assert found.second_token == right[1][5]


def test_compare_reports_the_earliest_difference(model: Transformer, right: list[list[int]]) -> None:
    runs = {"A": [run(right)], "B": [run(changed(right, 0, 4))], "C": [run(right), run(changed(right, 1, 2))]}
    found = compare(model, PROMPTS, runs).difference
    assert found is not None
    assert (found.row, found.place, found.first, found.second) == (1, 2, "A", "C")
    assert (found.first_token, found.second_token) == (right[1][2], (right[1][2] + 1) % 17)
    with torch.inference_mode():
        sequence = torch.tensor([PROMPTS[1] + right[1][:2]])
        logits = model.logits(model.hidden_states(sequence))[0, -1]
    assert found.gap == pytest.approx(float(logits[found.first_token] - logits[found.second_token]), rel=1e-4)
    assert "row 1, new token 2" in str(found)
    assert "try another --seed" in str(found)


def test_compare_finds_differences_after_given_tokens(model: Transformer, right: list[list[int]]) -> None:
    chosen = pick(right, (0, 2, 5))
    chosen[0][1] = (chosen[0][1] + 1) % 17
    found = compare(model, PROMPTS, {"A": [run(right)], "B": [run(chosen, (0, 2, 5))]}).difference
    assert found is not None
    assert (found.row, found.place, found.second) == (0, 2, "B")


def test_compare_counts_gaps_within_tolerance_as_ties(model: Transformer, right: list[list[int]]) -> None:
    chosen = run(changed(right, 1, 2), tuple(range(6)))
    runs = {"A": [run(right)], "B": [chosen, chosen]}
    strict = compare(model, PROMPTS, runs).difference
    assert strict is not None
    loose = compare(model, PROMPTS, runs, Loose(strict.gap * 1.01))
    assert loose.difference is None
    assert (loose.tied_places, loose.largest_tie) == (1, strict.gap)
    assert loose.largest_tolerance == strict.gap * 1.01
    tight = compare(model, PROMPTS, runs, Loose(strict.gap * 0.99))
    assert tight.difference is not None
    assert "is a rounding tie" in str(tight.difference)


def test_compare_continues_with_own_tokens_after_tie(model: Transformer, right: list[list[int]]) -> None:
    """Past a tie two runs have different tokens before them: the second one may still be wrong, or right."""
    other = changed(right, 0, 1)
    with torch.inference_mode():
        for place in range(2, 6):
            sequence = torch.tensor([PROMPTS[0] + other[0][:place]])
            other[0][place] = int(model.logits(model.hidden_states(sequence))[0, -1].argmax())
    gap = compare(model, PROMPTS, {"A": [run(right)], "B": [run(other)]}).difference
    assert gap is not None
    tie = Loose(gap.gap * 1.0001)
    assert compare(model, PROMPTS, {"A": [run(right)], "B": [run(other)]}, tie).difference is None
    logits = new_logits(model, PROMPTS[0], other[0])[4]
    far = int((logits.max() - logits).argmax())
    assert logits.max() - logits[far] > tie.tolerance(None, None)
    broken = [[*other[0][:4], far, other[0][5]], other[1]]
    found = compare(model, PROMPTS, {"A": [run(right)], "B": [run(broken)]}, tie).difference
    assert found is not None
    assert (found.row, found.place, found.first, found.second) == (0, 4, "B", FULL_PASS)


def test_nan_gap_is_never_a_tie(model: Transformer, right: list[list[int]]) -> None:
    with torch.no_grad():
        next(iter(model.parameters())).fill_(math.nan)
    runs = {"A": [run(right)], "B": [run(changed(right, 0, 0))]}
    assert compare(model, PROMPTS, runs, Loose(1e9)).difference is not None


def test_rounding_tolerance_fits_bfloat16(build_tiny: Callable[..., Transformer]) -> None:
    """It covers what rounding does to a decoding step, by no more than a few times, and is nothing without rounding."""
    model = build_tiny(seed=5, d_model=32, d_mlp=64, n_layers=3, vocab_size=500)
    prompt, ids = list(range(40, 64)), [7, 300, 21, 450, 6, 99]
    engine = Engine(model, dtype="bfloat16")
    tolerance = Rounding(model, engine.model).tolerance(prompt, ids)
    full = new_logits(engine.model, prompt, ids)
    logits, state = engine.prefill([prompt], 40)
    apart = []
    for place, token in enumerate(ids):
        noise = (logits[0] - full[place]).float()
        apart.append(float(noise.max() - noise.min()))
        logits = engine.decode(torch.tensor([token]), state)
    assert max(apart) < 3 * tolerance
    assert tolerance < 0.2 * full.std().item()
    assert Rounding(model, model).tolerance(prompt, ids) == 0.0

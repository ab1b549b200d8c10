"""Each way of decoding gives the model's own greedy continuation, and its seconds are cut where they should be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from psannlm.benchmarks.decoding import CASES, Case, DecodeRun, decode
from psannlm.models.transformer import Transformer

PROMPTS = [[3, 1, 4], [1, 5, 9]]


class FakeClock:
    """Time that passes by one second for every token position that the model computes."""

    def __init__(self, model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        compute = model.hidden_states

        def hidden_states(input_ids: Tensor, *rest: object) -> Tensor:
            self.now += input_ids.numel()
            return compute(input_ids, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(model, "hidden_states", hidden_states)

    def __call__(self) -> float:
        return self.now


def greedy(model: Transformer, prompt: list[int], n_new: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n_new):
            ids.append(int(model.logits(model.hidden_states(torch.tensor([ids])))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_gives_the_greedy_continuation(case: Case, build_tiny: Callable[..., Transformer]) -> None:
    model = build_tiny(seed=3)
    run = decode(model, PROMPTS, 6, case)
    assert run.ids == [greedy(model, prompt, 6) for prompt in PROMPTS]
    assert (run.cache_bytes > 0) == case.use_cache


@pytest.mark.parametrize(
    ("case", "prefill", "first", "decoding"),
    [
        # 2 rows of 3 prompt tokens; then one position per row and token.
        (Case(use_cache=True, is_batched=True), 6, 6, 2 * 3),
        # The rows one after the other; a row's first token comes 3 positions after its own start.
        (Case(use_cache=True, is_batched=False), 6, 3, 2 * 3),
        # Whole sequences of 4, 5 and 6 tokens.
        (Case(use_cache=False, is_batched=True), 6, 6, 2 * (4 + 5 + 6)),
        (Case(use_cache=False, is_batched=False), 6, 3, 2 * (4 + 5 + 6)),
    ],
    ids=str,
)
def test_seconds_and_rates(
    case: Case,
    prefill: int,
    first: int,
    decoding: int,
    build_tiny: Callable[..., Transformer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The uncached cases compute every position anew, the cached ones each position once: this is the definition."""
    model = build_tiny()
    clock = FakeClock(model, monkeypatch)
    told: list[tuple[int, int]] = []
    run = decode(model, PROMPTS, 4, case, clock=clock, count=lambda done, total: told.append((done, total)))
    assert (run.prefill_s, run.first_token_s, run.decode_s) == (prefill, first, decoding)
    assert run.total_s == prefill + decoding
    assert run.decode_tokens_per_s == pytest.approx(6 / decoding)
    assert run.tokens_per_s == pytest.approx(8 / (prefill + decoding))
    assert told == sorted(told)
    assert told[-1] == (8, 8)


def test_rows_join_in_order() -> None:
    rows = [DecodeRun([[1, 2]], 1.0, 2.0, 3.0, 5.0, 10), DecodeRun([[3, 4]], 3.0, 4.0, 5.0, 9.0, 12)]
    assert DecodeRun.join(rows) == DecodeRun([[1, 2], [3, 4]], 4.0, 3.0, 8.0, 14.0, 12)

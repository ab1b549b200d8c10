"""Log probabilities: those of the full forward pass, whatever the decoding settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from psannlm.errors import GenerationError
from psannlm.generation.batch_decode import BatchDecoder
from psannlm.generation.engine import Engine
from psannlm.generation.requests import SamplingConfig
from psannlm.models.transformer import Transformer

Build = Callable[..., Transformer]
Decode = Callable[..., BatchDecoder]
PROMPTS: Sequence[Sequence[int]] = [[1, 2, 3, 1, 2], [4], [5, 6, 5, 6, 5, 6, 5]]
SETTINGS = SamplingConfig(temperature=0.7, top_k=5, repetition_penalty=1.3, seed=1)


def require_full_forward(model: Transformer, decoding: BatchDecoder, prompts: Sequence[Sequence[int]]) -> None:
    for prompt, ids, found in zip(prompts, decoding.generated, decoding.logprobs, strict=True):
        hidden = model.hidden_states(torch.tensor([[*prompt, *ids]]))
        wanted = model.logits(hidden)[0].double().log_softmax(-1)[len(prompt) - 1 : -1]
        assert [scored.token for scored in found] == ids
        for row, scored in zip(wanted, found, strict=True):
            assert scored.logprob == pytest.approx(float(row[scored.token]), abs=1e-5)
            values = [value for _, value in scored.top]
            assert values == sorted(values, reverse=True)
            assert values == pytest.approx(row.topk(len(values)).values.tolist(), abs=1e-5)
            assert [float(row[token]) for token, _ in scored.top] == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize("base", ["waveresnet", "transformer"])
@pytest.mark.parametrize("speculate", [0, 4])
@torch.no_grad()
def test_logprobs_are_those_of_full_forward(base: str, speculate: int, build_tiny: Build, decode: Decode) -> None:
    model = build_tiny(base=base)
    decoding = decode(model, PROMPTS, SETTINGS, 12, logprobs=4, speculate=speculate, forbidden_ids=[0])
    require_full_forward(model, decoding, PROMPTS)


@pytest.mark.slow
@torch.no_grad()
def test_logprobs_of_compiled_steps_are_those_of_full_forward(build_tiny: Build, decode: Decode) -> None:
    model = build_tiny()
    decoding = decode(Engine(model, compile=True), PROMPTS, SETTINGS, 6, logprobs=2)
    require_full_forward(model, decoding, PROMPTS)


def test_logprobs_do_not_change_tokens(build_tiny: Build, decode: Decode) -> None:
    model = build_tiny()
    plain = decode(model, PROMPTS, SETTINGS, 12)
    assert plain.logprobs == [[], [], []]
    scored = decode(model, PROMPTS, SETTINGS, 12, logprobs=0)
    assert scored.generated == plain.generated
    assert all(token.top == () for row in scored.logprobs for token in row)
    # More than the vocabulary: all of it.
    assert len(decode(model, PROMPTS, SETTINGS, 1, logprobs=100).logprobs[0][0].top) == 17


@pytest.mark.parametrize("value", [-1, 101, 1.5, True, "3"])
def test_logprobs_out_of_range_raise(value: Any, build_tiny: Build, decode: Decode) -> None:
    with pytest.raises(GenerationError, match=f"logprobs {value!r} is not a whole number in 0 .. 100"):
        decode(build_tiny(), PROMPTS, logprobs=value)

"""Fixtures of the generation tests: finished decoders, decoding without a cache, and engines with scripted logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from psannlm.generation.batch_decode import BatchDecoder
from psannlm.generation.engine import Engine
from psannlm.generation.requests import SamplingConfig
from psannlm.generation.sampling import next_tokens
from psannlm.models.kv_cache import KVCache
from psannlm.models.transformer import Transformer

GREEDY = SamplingConfig(temperature=0.0)


@pytest.fixture(scope="session")
def decode() -> Callable[..., BatchDecoder]:
    """Return a function that gives back a decoding that has run to its end, of a model or an engine."""

    def run(
        model: Transformer | Engine,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig = GREEDY,
        n: int = 10,
        **more: Any,
    ) -> BatchDecoder:
        engine = model if isinstance(model, Engine) else Engine(model)
        decoding = BatchDecoder(engine, prompts, max_new_tokens=n, sampling=sampling, **{"eos_id": None, **more})
        for _ in decoding:
            pass
        return decoding

    return run


@pytest.fixture(scope="session")
def decode_naively() -> Callable[..., list[int]]:
    """Return a function that decodes without a cache: a full forward pass for each token, one row at a time."""

    @torch.no_grad()
    def run(model: Transformer, prompt: Sequence[int], sampling: SamplingConfig = GREEDY, n: int = 10) -> list[int]:
        ids = list(prompt)
        generator = torch.Generator().manual_seed(sampling.seed or 0)
        for _ in range(n):
            logits = model.logits(model.hidden_states(torch.tensor([ids]))[:, -1])
            seen = torch.zeros_like(logits, dtype=torch.bool)
            seen[0, ids] = True
            uniforms = torch.rand(1, generator=generator) if sampling.temperature else None
            ids.append(int(next_tokens(logits, sampling, uniforms, seen)))
        return ids[len(prompt) :]

    return run


class Chain:
    """Replaces an engine's logits by a fixed successor of each token, and records the batch size of every pass.

    The real passes still run, so that the cache grows and shrinks as usual.
    """

    def __init__(self, engine: Engine, following: Callable[[int], int], monkeypatch: pytest.MonkeyPatch) -> None:
        self.batch_sizes: list[int] = []
        real_prefill, real_verify = engine.prefill, engine.forward_tokens

        def after(tokens: Tensor) -> Tensor:
            logits = torch.zeros(*tokens.shape, engine.model.config.vocab_size or 0)
            wanted = [following(int(token)) for token in tokens.flatten()]
            return logits.scatter(-1, torch.tensor(wanted).view(*tokens.shape, 1), 100.0)

        def prefill(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[Tensor, KVCache]:
            self.batch_sizes.append(len(prompts))
            _, state = real_prefill(prompts, max_new_tokens)
            return after(torch.tensor([prompt[-1] for prompt in prompts])), state

        def forward_tokens(tokens: Tensor, state: KVCache) -> Tensor:
            self.batch_sizes.append(len(tokens))
            real_verify(tokens, state)
            return after(tokens)

        monkeypatch.setattr(engine, "prefill", prefill)
        monkeypatch.setattr(engine, "forward_tokens", forward_tokens)


@pytest.fixture
def lead(monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine, Callable[[int], int]], Chain]:
    """Return a function that fixes the successor of each token for an engine."""
    return lambda engine, following: Chain(engine, following, monkeypatch)

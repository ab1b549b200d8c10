"""Fixtures: a tiny model with the vocabulary of bytes, and a scheduler of it that is driven step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from psannlm.generation.engine import Engine
from psannlm.models.transformer import Transformer
from psannlm.serving.scheduler import GenerationRequest, Handle, Scheduler, Update

CONTEXT = 400


class Served:
    """A scheduler, and what its sequences have got, by name."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.updates: dict[str, list[Update]] = {}

    def submit(self, name: str, request: GenerationRequest) -> Handle:
        self.updates[name] = []
        (handle,) = self.scheduler.submit([request], lambda _, update: self.updates[name].append(update))
        return handle

    def run(self) -> None:
        while self.scheduler.has_work:
            self.scheduler.step()

    def ids(self, name: str) -> list[int]:
        return [token for update in self.updates[name] for token in update.ids]

    def text(self, name: str) -> str:
        return "".join(update.text for update in self.updates[name])

    def last(self, name: str) -> Update:
        assert [update.is_last for update in self.updates[name]].index(True) == len(self.updates[name]) - 1
        return self.updates[name][-1]


@pytest.fixture(scope="session")
def model(build_tiny: Callable[..., Transformer]) -> Transformer:
    return build_tiny(vocab_size=260, max_seq_len=CONTEXT, base="waveresnet", n_kv_heads=1)


@pytest.fixture(scope="session")
def engine(model: Transformer) -> Engine:
    return Engine(model)


@pytest.fixture
def serve(engine: Engine, byte_tokenizer: Any) -> Callable[..., Served]:
    """Return a function that starts a scheduler; its keywords are those of ``Scheduler``, and ``engine``."""

    def start(**settings: Any) -> Served:
        return Served(Scheduler(settings.pop("engine", engine), byte_tokenizer, **settings))

    return start

"""Fixtures: a tiny model with the vocabulary of bytes, its scheduler driven step by step, and a server of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from psannlm.generation.engine import Engine
from psannlm.models.transformer import Transformer
from psannlm.serving.scheduler import GenerationRequest, Handle, Scheduler, Update

for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)

from psannlm.serving.guard import HostRule  # noqa: E402
from psannlm.serving.metrics import Metrics  # noqa: E402
from psannlm.serving.server import HttpServer  # noqa: E402
from psannlm.serving.service import Service  # noqa: E402
from psannlm.serving.sockets import bind_socket  # noqa: E402

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


class RunningServer:
    """A server of the tiny model on a loopback port, in a thread of this process."""

    def __init__(self, scheduler: Scheduler, *, key: str | None = None, max_tokens: int = 100) -> None:
        self.scheduler = scheduler
        bound = bind_socket("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        is_ready = threading.Event()
        self.service = Service(
            model="tiny",
            tokenizer=scheduler.tokenizer,
            context=CONTEXT,
            max_tokens=max_tokens,
            scheduler=lambda: None,
            metrics=Metrics(),
        )
        self.http = HttpServer(self.service, lambda: scheduler, bound, HostRule("127.0.0.1"), key, is_ready.set)
        self._thread = threading.Thread(target=self.http.run)
        self._thread.start()
        assert is_ready.wait(30)

    def stop(self) -> None:
        self.http.drain()
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture(scope="session")
def start_server() -> Callable[..., RunningServer]:
    """Return a starter of servers, which the caller stops: ``start(scheduler, key=..., max_tokens=...)``."""
    return RunningServer


@pytest.fixture(scope="session")
def running(engine: Engine, byte_tokenizer: Any) -> Iterator[RunningServer]:
    """A server without a key, shared by tests that leave nothing behind."""
    server = RunningServer(Scheduler(engine, byte_tokenizer, max_batch=16))
    yield server
    server.stop()


@pytest.fixture
def client(running: RunningServer) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client

"""Fixtures: a tiny model with the vocabulary of bytes, its scheduler driven step by step, and a server of it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

from psannlm.generation.engine import Engine
from psannlm.models.transformer import Transformer
from psannlm.serving.engine_client import EngineClient
from psannlm.serving.engine_host import EngineHost
from psannlm.serving.messages import GenerationRequest, RequestLimits, Update
from psannlm.serving.scheduler import Handle, Scheduler

for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)

from psannlm.serving.guard import HostRule  # noqa: E402
from psannlm.serving.metrics import Metrics  # noqa: E402
from psannlm.serving.server import HttpServer  # noqa: E402
from psannlm.serving.service import Service  # noqa: E402
from psannlm.serving.sockets import bind_socket, start_listening  # noqa: E402

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


def connect(
    prepare: Callable[[], Scheduler], limits: RequestLimits, on_ready: Callable[[], None], **sizes: int
) -> tuple[EngineHost, EngineClient]:
    """Return both ends of a connection between the engine's process and the HTTP process, within this process."""
    ours, theirs = socket.socketpair()
    sizes = {"max_batch": 16, "max_queue": 64, **sizes}
    host = EngineHost(prepare, Connection(ours.detach()), on_ready)
    return host, EngineClient(Connection(theirs.detach()), limits, **sizes)


class RunningServer:
    """A server of the tiny model on a loopback port: both of its processes, each as a thread of this one.

    Args:
        prepare: makes the scheduler, in the engine's thread.
        max_queue: most sequences that wait.
        on_ready: called once requests are taken.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        key: str | None = None,
        max_tokens: int = 100,
        max_queue: int = 64,
        prepare: Callable[[], Scheduler] | None = None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.scheduler = scheduler
        bound = bind_socket("127.0.0.1", 0)
        start_listening(bound)
        self.port = bound.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.is_ready = threading.Event()
        self.is_left: bool | None = None

        def note_ready() -> None:
            on_ready()
            self.is_ready.set()

        sizes = {"max_batch": scheduler.max_batch, "max_queue": max_queue}
        self.host, engine = connect(prepare or (lambda: scheduler), scheduler.limits, note_ready, **sizes)
        self.service = Service("tiny", scheduler.tokenizer, CONTEXT, max_tokens, engine, metrics=Metrics())
        self.http = HttpServer(self.service, bound, HostRule("127.0.0.1"), key)
        self.threads = [threading.Thread(target=self._run_host), threading.Thread(target=self.http.run)]
        for thread in self.threads:
            thread.start()

    def _run_host(self) -> None:
        self.is_left = self.host.run()

    def wait_until_ready(self) -> RunningServer:
        assert self.is_ready.wait(30)
        return self

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def join(self, timeout_s: float = 30) -> None:
        for thread in self.threads:
            thread.join(timeout_s)
            assert not thread.is_alive()

    def stop(self) -> None:
        if self.threads[0].is_alive():
            self.host.drain()
        self.join()


@pytest.fixture(scope="session")
def start_server() -> Callable[..., RunningServer]:
    """Return a starter of servers, which the caller stops: ``start(scheduler, key=..., max_tokens=...)``."""

    def start(scheduler: Scheduler, **settings: Any) -> RunningServer:
        return RunningServer(scheduler, **settings).wait_until_ready()

    return start


@pytest.fixture(scope="session")
def running(engine: Engine, byte_tokenizer: Any) -> Iterator[RunningServer]:
    """A server without a key, shared by tests that leave nothing behind."""
    server = RunningServer(Scheduler(engine, byte_tokenizer, max_batch=16)).wait_until_ready()
    yield server
    server.stop()


@pytest.fixture
def client(running: RunningServer) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client

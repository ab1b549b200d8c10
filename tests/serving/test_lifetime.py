"""Start and end of the server: while the model loads, and on SIGTERM with requests that do not end in time."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from psannlm.generation.engine import Engine
from psannlm.serving import app as app_module
from psannlm.serving import engine_host as host_module
from psannlm.serving import events as events_module
from psannlm.serving import server as server_module
from psannlm.serving.scheduler import Scheduler

from .conftest import RunningServer

BODY = {"model": "tiny", "prompt": "the sea", "max_tokens": 4}


class LoadingServer(RunningServer):
    """A server whose engine is prepared when ``release`` is set."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.release = threading.Event()
        self.status_when_ready = 0

        def prepare() -> Scheduler:
            self.release.wait(60)
            return scheduler

        super().__init__(scheduler, max_tokens=300, prepare=prepare, on_ready=self._note_status)
        while self.ask("GET", "/v1/models")[0] != 200:
            time.sleep(0.01)

    def _note_status(self) -> None:
        self.status_when_ready = self.ask("GET", "/health")[0]

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, str], Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        content = None if body is None else json.dumps(body)
        try:
            connection.request(method, path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, json.loads(answer.read())
        except (ConnectionRefusedError, ConnectionResetError):
            return 0, {}, None
        finally:
            connection.close()


@pytest.fixture
def loading(engine: Engine, byte_tokenizer: Any) -> Iterator[LoadingServer]:
    server = LoadingServer(Scheduler(engine, byte_tokenizer))
    yield server
    server.release.set()
    server.stop()


def test_loading_server_answers_503_until_it_is_ready(loading: LoadingServer) -> None:
    assert loading.ask("GET", "/health")[0] == 503
    status, headers, body = loading.ask("POST", "/v1/completions", BODY)
    assert (status, body["error"]["code"], headers["retry-after"]) == (503, "loading", "5")
    loading.release.set()
    deadline = time.monotonic() + 20
    while not loading.status_when_ready:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Who is told that the server is ready can use it.
    assert loading.status_when_ready == 200
    assert loading.ask("POST", "/v1/completions", BODY)[0] == 200


def test_loading_server_ends_without_waiting_for_its_engine(
    loading: LoadingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "_PREPARE_END_S", 0.1)
    loading.host.drain()
    loading.join(20)
    assert loading.is_left is True


@pytest.fixture
def wait_for(loading: LoadingServer) -> Callable[[], None]:
    def wait() -> None:
        loading.release.set()
        while loading.ask("GET", "/health")[0] != 200:
            time.sleep(0.01)

    return wait


@pytest.mark.parametrize("ends_by", ["drain limit", "second Ctrl-C"])
def test_endless_request_is_cut_off_with_an_error(
    ends_by: str, loading: LoadingServer, wait_for: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if ends_by == "drain limit":
        monkeypatch.setattr(server_module, "DRAIN_TIMEOUT_S", 0.5)
    wait_for()
    scheduler = loading.scheduler
    # An engine that makes no progress, so that the request can never end by itself.
    monkeypatch.setattr(scheduler, "step", lambda: time.sleep(0.01))
    body = json.dumps({**BODY, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", loading.port), timeout=20) as raw:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        raw.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        assert b"200" in raw.recv(1000)
        loading.host.drain()
        time.sleep(0.2)
        assert all(thread.is_alive() for thread in loading.threads)
        if ends_by == "second Ctrl-C":
            loading.host.cut_off()
        received = b""
        while part := raw.recv(1000):
            received += part
    assert b"generation failed: the server is ending" in received
    # The last chunk: the response is whole.
    assert received.endswith(b"0\r\n\r\n")
    loading.join(20)
    assert loading.is_left is False


def test_body_that_does_not_arrive_answers_408(
    loading: LoadingServer, wait_for: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "BODY_TIMEOUT_S", 0.3)
    wait_for()
    with socket.create_connection(("127.0.0.1", loading.port), timeout=30) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n"
            b"Content-Type: application/json\r\n\r\n{"
        )
        received = raw.recv(1000)
        assert b" 408 " in received


def test_stream_without_progress_shows_that_it_lives(
    loading: LoadingServer, wait_for: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By comments between the events, which proxies and clients count as activity; a running stream has none."""
    monkeypatch.setattr(events_module, "PING_S", 0.2)
    wait_for()
    scheduler = loading.scheduler
    step, n_steps = scheduler.step, 0

    def halting_step() -> None:
        nonlocal n_steps
        n_steps += 1
        if n_steps == 4:
            time.sleep(1.0)
        step()

    monkeypatch.setattr(scheduler, "step", halting_step)
    asked = urllib.request.Request(
        f"http://127.0.0.1:{loading.port}/v1/completions",
        json.dumps({**BODY, "max_tokens": 200, "stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=30) as answer:
        events = answer.read().decode().split("\n\n")
    pings = [at for at, event in enumerate(events) if event == ": ping"]
    assert 2 <= len(pings) <= 5
    assert pings[-1] - pings[0] < len(pings)
    assert all(event == ": ping" or event.startswith("data: ") for event in events[:-1])
    assert events[-2:] == ["data: [DONE]", ""]

"""Who gets an answer: keys, Host and Origin headers, content types, sizes, slow and vanished clients."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from psannlm.generation.engine import Engine
from psannlm.serving import server as server_module
from psannlm.serving.engine_client import EngineClient
from psannlm.serving.guard import HostRule, is_loopback
from psannlm.serving.limits import MAX_BODY_BYTES
from psannlm.serving.page import load_page
from psannlm.serving.scheduler import Scheduler

from .conftest import RunningServer

KEY = "0123456789abcdef"
ROUTES = (
    "/",
    "/v1/models",
    "/v1/models/tiny",
    "/v1/completions",
    "/v1/chat/completions",
    "/metrics",
    "/nothing",
    "/v1",
)
BODY = {"model": "tiny", "prompt": "The sea", "max_tokens": 2}


def ask(
    server: RunningServer, path: str, body: Any = None, *, method: str | None = None, **headers: str
) -> tuple[int, dict[str, str], str]:
    """Return status, headers and text of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=30)
    sent = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if sent is not None and "Content-Type" not in named:
        named["Content-Type"] = "application/json"
    connection.request(method or ("GET" if body is None else "POST"), path, sent, named)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, text


@pytest.fixture(scope="module")
def locked(engine: Engine, byte_tokenizer: Any) -> Iterator[RunningServer]:
    server = RunningServer(Scheduler(engine, byte_tokenizer, max_batch=2), key=KEY, max_queue=1).wait_until_ready()
    yield server
    server.stop()


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_but_health_needs_the_key(path: str, locked: RunningServer) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Token {KEY}"},
        {"Authorization": "Basic !!"},
        # Of a browser's dialog, whose answer the browser would also send for pages of other sites.
        {"Authorization": "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()},
    ):
        status, answered, text = ask(locked, path, **headers)
        assert status == 401
        assert answered["www-authenticate"] == "Bearer"
        if path == "/":
            # The page, which is the same for everybody, asks for the key.
            assert text.encode() == load_page().content
        else:
            assert json.loads(text)["error"]["code"] == "invalid_api_key"
    assert ask(locked, "/health")[0] == 200


def test_key_opens_every_route(locked: RunningServer) -> None:
    bearer = f"Bearer {KEY}"
    assert ask(locked, "/v1/completions", BODY, Authorization=bearer)[0] == 200
    status, headers, text = ask(locked, "/", Authorization=bearer)
    assert status == 200
    assert "<html" in text
    assert headers["content-security-policy"].startswith("default-src 'none'")


def test_server_without_page_refuses_root_in_json(locked: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locked.service, "has_page", False)
    status, _, text = ask(locked, "/")
    assert status == 401
    assert json.loads(text)["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "10.0.0.1", "", "[::1", "a:b:c"]
)
def test_foreign_host_is_refused_on_every_route(host: str, running: RunningServer) -> None:
    for path in ("/health", "/v1/models", "/"):
        assert ask(running, path, Host=host)[0] in ((400, 403) if not host else (403,))


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9999", "127.0.0.1:1", "[::1]:5", "localhost."])
def test_loopback_names_are_accepted(host: str, running: RunningServer) -> None:
    assert ask(running, "/health", Host=host)[0] == 200


def test_host_rule_takes_addresses_and_named_hosts() -> None:
    rule = HostRule("0.0.0.0", ("lm.example.org",))
    assert all(map(rule.accepts, ("LM.example.org:443", "192.168.1.5:8000", "[fe80::1]", "localhost")))
    assert not any(map(rule.accepts, ("example.org", "x.lm.example.org", "", "1.2.3.4.5", "lm.example.org:x")))
    assert [is_loopback(host) for host in ("127.0.0.9", "::1", "localhost", "0.0.0.0", "::", "10.0.0.1", "pc")] == [
        *[True] * 3,
        *[False] * 4,
    ]


def test_pages_of_other_sites_are_refused(running: RunningServer) -> None:
    status, headers, _ = ask(running, "/v1/completions", BODY, Origin="https://evil.example")
    assert status == 403
    assert ask(running, "/v1/completions", BODY, Origin=running.url)[0] == 200
    assert ask(running, "/v1/completions", BODY, Origin="null")[0] == 403
    status, answered, _ = ask(running, "/v1/completions", method="OPTIONS", Origin=running.url)
    assert status == 405
    assert not [name for name in {**headers, **answered} if name.startswith("access-control")]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
def test_other_content_types_are_refused(kind: str, running: RunningServer) -> None:
    assert ask(running, "/v1/completions", BODY, **{"Content-Type": kind})[0] == 415


def test_large_body_is_refused_by_header_and_by_size(running: RunningServer) -> None:
    body = json.dumps({**BODY, "prompt": "x" * MAX_BODY_BYTES}).encode()
    status, _, text = ask(running, "/v1/completions", body)
    assert status == 413
    assert json.loads(text)["error"]["code"] == "body_too_large"
    port = int(running.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        received = b""
        try:
            for _ in range(20):
                raw.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
            received = raw.recv(1000)
        except ConnectionError:
            received = received or raw.recv(1000)
        assert b" 413 " in received


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/completions", 405), ("GET", "/v2", 404)])
def test_unknown_routes_answer_in_the_shape_of_errors(
    method: str, path: str, status: int, running: RunningServer
) -> None:
    found, _, text = ask(running, path, method=method)
    assert found == status
    assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}


def test_connection_without_a_request_is_dropped(running: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HEADER_TIMEOUT_S", 0.3)
    port = int(running.url.rpartition(":")[2])
    for sent in (b"", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-A: "):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
            raw.sendall(sent)
            assert raw.recv(100) == b""
    # The same within a connection that is kept alive.
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = b""
        while b'"ok"}' not in received:
            received += raw.recv(1000)
        raw.sendall(b"GET /health HT")
        assert raw.recv(100) == b""


def eventually(condition: Callable[[], bool], within_s: float = 20) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("is_streamed", [True, False])
def test_vanished_client_frees_its_row(is_streamed: bool, running: RunningServer) -> None:
    scheduler = running.scheduler
    assert eventually(lambda: not scheduler.has_work)
    port = int(running.url.rpartition(":")[2])
    body = json.dumps(
        {**BODY, "prompt": "x" * 300, "max_tokens": 90, "n": 16, "stream": is_streamed, "seed": 1}
    ).encode()
    before = scheduler.counters.n_generated
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        raw.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        assert eventually(lambda: scheduler.counters.n_generated > before)
    assert eventually(lambda: not scheduler.has_work)
    # Far from all of what was asked for.
    assert scheduler.counters.n_generated - before < 16 * 90


def test_full_queue_answers_429_with_retry_after(locked: RunningServer) -> None:
    key = f"Bearer {KEY}"
    status, _, text = ask(locked, "/v1/completions", {**BODY, "n": 4}, Authorization=key)
    assert status == 400
    assert "4 choices are more than the 3" in json.loads(text)["error"]["message"]
    engine = locked.service.engine
    numbers = engine.submit([_long_request(engine)] * 3, lambda number, update: None)
    status, headers, text = ask(locked, "/v1/completions", BODY, Authorization=key)
    engine.cancel(numbers)
    assert status == 429
    assert 1 <= int(headers["retry-after"]) <= 60
    assert json.loads(text)["error"]["code"] == "queue_full"


def test_request_behind_full_queue_is_refused_before_its_body(locked: RunningServer) -> None:
    """Bodies that are read and prompts that are encoded count: they cost memory and time."""
    port = int(locked.url.rpartition(":")[2])
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
    waiting = []
    for _ in range(3):
        raw = socket.create_connection(("127.0.0.1", port), timeout=10)
        raw.sendall(head.encode() + b"{")
        waiting.append(raw)
    assert eventually(lambda: locked.service._n_preparing == 3)
    status, headers, text = ask(locked, "/v1/completions", BODY, Authorization=f"Bearer {KEY}")
    assert (status, json.loads(text)["error"]["code"]) == (429, "queue_full")
    assert 1 <= int(headers["retry-after"]) <= 60
    for raw in waiting:
        raw.close()
    assert eventually(lambda: locked.service._n_preparing == 0)
    assert ask(locked, "/v1/completions", BODY, Authorization=f"Bearer {KEY}")[0] == 200


def test_request_behind_open_one_ends_the_connection(running: RunningServer) -> None:
    """Else the server would not see that the client goes away. An empty line behind a body is no request."""
    port, scheduler = int(running.url.rpartition(":")[2]), running.scheduler
    body = json.dumps({**BODY, "max_tokens": 90, "n": 16, "seed": 1}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    request = f"{head}Content-Type: application/json\r\n\r\n".encode() + body
    before = scheduler.counters.n_generated
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        raw.sendall(request)
        assert eventually(lambda: scheduler.counters.n_generated > before)
        raw.sendall(request)
        assert raw.recv(1) == b""
    assert eventually(lambda: not scheduler.has_work)
    assert scheduler.counters.n_generated - before < 16 * 90
    body = json.dumps(BODY).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        raw.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        raw.sendall(b"\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 200 ")


def test_client_that_stops_reading_is_dropped(running: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = server_module._TimedProtocol
    connect = protocol.connection_made

    def connect_with_small_buffer(self: Any, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connect(self, transport)

    monkeypatch.setattr(protocol, "connection_made", connect_with_small_buffer)
    monkeypatch.setattr(server_module, "STALL_TIMEOUT_S", 0.3)
    port, scheduler = int(running.url.rpartition(":")[2]), running.scheduler
    body = json.dumps({**BODY, "max_tokens": 90, "n": 64, "logprobs": 5, "stream": True, "seed": 1}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        raw.settimeout(10)
        raw.connect(("127.0.0.1", port))
        raw.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        assert eventually(lambda: scheduler.has_work)
        assert eventually(lambda: not running.service.engine.has_work and not scheduler.has_work)
        assert b"[DONE]" not in _read_all(raw)


def _read_all(raw: socket.socket) -> bytes:
    received = b""
    try:
        while part := raw.recv(1 << 16):
            received += part
    except ConnectionError:
        pass
    return received


def _long_request(engine: EngineClient) -> Any:
    from psannlm.generation.requests import SamplingConfig
    from psannlm.serving.messages import GenerationRequest

    return GenerationRequest([1, 5], engine.limits.context - 2, SamplingConfig(temperature=0.0))


def test_metrics_count_requests_and_tokens(running: RunningServer) -> None:
    def value(name: str) -> float:
        lines = ask(running, "/metrics")[2].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = [value(name) for name in ('psannlm_requests_total{status="200"}', "psannlm_generated_tokens_total")]
    assert ask(running, "/v1/completions", {**BODY, "seed": 1})[0] == 200
    assert ask(running, "/v1/completions", {**BODY, "n": 0})[0] == 400
    assert value('psannlm_requests_total{status="200"}') == before[0] + 1
    assert value("psannlm_generated_tokens_total") == before[1] + 2
    assert value('psannlm_requests_total{status="400"}') >= 1
    assert value("psannlm_time_to_first_token_seconds_count") >= 1
    assert value("psannlm_queue_sequences") == value("psannlm_batch_sequences") == 0

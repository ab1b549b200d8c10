"""HTTP exchanges that stamp bytes as they arrive and are parsed after the load.

The client shares the processor with the server that it measures. While the load runs, it only records the bytes of a
response with their times of arrival; h11 reads them afterwards.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from psannlm.benchmarks.harness.interleaved import Clock

COMPLETIONS = "/v1/completions"


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass
class Recording:
    """The bytes of one response with their times of arrival, in seconds of the load's clock.

    Attributes:
        sent_s: when the request was sent, or was due to be.
        chunks: time of arrival and bytes of every read.
        ended_s: when the server closed the connection, or the client gave up.
        failure: why there is no whole response; empty if the server closed the connection.
    """

    sent_s: float
    chunks: list[tuple[float, bytes]] = field(default_factory=list)
    ended_s: float = 0.0
    failure: str = ""


class Recorder(asyncio.Protocol):
    """Sends a request once connected, and records what arrives until the server closes the connection.

    Attributes:
        closed: done when the connection has ended, with the reason; empty if the server closed it.
    """

    def __init__(self, request: bytes, clock: Clock = time.perf_counter) -> None:
        self.request, self.clock = request, clock
        self.chunks: list[tuple[float, bytes]] = []
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Record bytes."""
        self.chunks.append((self.clock(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        """Record the end of the connection."""
        if not self.closed.done():
            self.closed.set_result("" if exc is None else f"connection lost ({type(exc).__name__})")


async def exchange(
    address: Address, request: bytes, *, timeout_s: float, due_s: float | None = None, clock: Clock = time.perf_counter
) -> Recording:
    """Send ``request`` on a new connection and record the response. A failure is part of the recording.

    Args:
        timeout_s: seconds after which the client gives up.
        due_s: when the request was due, from which its latency counts; None: now.
    """
    recording = Recording(clock() if due_s is None else due_s)

    async def record() -> None:
        loop = asyncio.get_running_loop()
        transport, recorder = await loop.create_connection(lambda: Recorder(request, clock), address.host, address.port)
        recording.chunks = recorder.chunks
        try:
            recording.failure = await recorder.closed
        finally:
            transport.abort()

    try:
        await asyncio.wait_for(record(), timeout_s)
    except asyncio.TimeoutError:
        recording.failure = f"no end within {timeout_s:g} s"
    except OSError as error:
        recording.failure = f"no connection ({type(error).__name__})"
    recording.ended_s = clock()
    return recording


def http_request(address: Address, method: str, path: str, body: Mapping[str, Any] | bytes | None = None) -> bytes:
    """Return the bytes of a request that asks the server to close the connection after its response."""
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nAccept: */*\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    return head.encode("ascii") + b"\r\n" + content


@dataclass(frozen=True)
class Response:
    """A parsed response: status, and the parts of its body with their times of arrival.

    ``failure`` says why it is not a whole HTTP response; empty if it is.
    """

    status: int
    parts: list[tuple[float, bytes]]
    failure: str = ""

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(part for _, part in self.parts)


def parse_response(recording: Recording) -> Response:
    """Parse the bytes of a response to a POST or GET as HTTP/1.1."""
    h11 = importlib.import_module("h11")
    connection = h11.Connection(our_role=h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("Host", "localhost"), ("Connection", "close")]))
    connection.send(h11.EndOfMessage())
    status, parts, is_closed = 0, [], False
    try:
        for arrival, chunk in [*recording.chunks, (recording.ended_s, b"")]:
            is_closed = not chunk
            if is_closed and recording.failure:
                break
            connection.receive_data(chunk)
            while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                if isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    parts.append((arrival, bytes(event.data)))
                elif isinstance(event, h11.EndOfMessage):
                    return Response(status, parts)
                elif isinstance(event, h11.ConnectionClosed):
                    break
    except h11.RemoteProtocolError as error:
        if not is_closed:
            return Response(status, parts, f"not HTTP ({error})")
    return Response(status, parts, recording.failure or "connection closed before the end of the response")


@dataclass(frozen=True)
class Answer:
    """A completion as the client received it.

    Attributes:
        status: of the response; 0 without one.
        text: of the completion.
        finish_reason: of the completion; empty where it is missing.
        n_tokens: new tokens as the server reports them; None where it does not.
        arrivals_s: seconds from the request to each part of the text that is not empty.
        total_s: seconds from the request to the end of the response.
        failure: why it is not a whole completion; empty if it is.
    """

    status: int
    text: str
    finish_reason: str
    n_tokens: int | None
    arrivals_s: list[float]
    total_s: float
    failure: str = ""


def parse_completion(recording: Recording) -> Answer:
    """Return the completion in a response, streamed or not."""
    response = parse_response(recording)
    text, finish_reason, n_tokens = "", "", None
    arrivals: list[float] = []
    failure = response.failure
    if response.status and response.status != 200:
        failure = f"HTTP {response.status}"
    total_s = (response.parts[-1][0] if response.parts else recording.ended_s) - recording.sent_s
    try:
        for arrival, content in _documents(response):
            if "error" in content:
                failure = failure or "error in the stream"
            usage = content.get("usage")
            if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
                n_tokens = usage["completion_tokens"]
            for choice in content.get("choices") or ():
                finish_reason = choice.get("finish_reason") or finish_reason
                if part := choice.get("text"):
                    text += part
                    arrivals.append(arrival - recording.sent_s)
    except (ValueError, AttributeError, TypeError):
        failure = failure or "not a completion in JSON"
    if not failure and not finish_reason:
        failure = "no finish reason"
    return Answer(response.status, text, finish_reason, n_tokens, arrivals, total_s, failure)


def _documents(response: Response) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield the JSON documents of a body with their times: of server-sent events, or the body itself."""
    if not response.body.lstrip().startswith((b"data:", b":", b"event:", b"id:", b"retry:")):
        if response.body:
            yield response.parts[-1][0], json.loads(response.body)
        return
    rest = b""
    for arrival, part in response.parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            content = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and content != b"[DONE]":
                yield arrival, json.loads(content)

"""Soak of the server: thousands of requests, among them clients that vanish, stall and send rubbish.

Whatever the others do, every well-behaved request must be answered, and rightly; memory must stay flat.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from psannlm.benchmarks.serving.exchange import (
    COMPLETIONS,
    Answer,
    Recorder,
    Recording,
    exchange,
    http_request,
    parse_completion,
    parse_response,
)
from psannlm.benchmarks.serving.own_engine import Asked
from psannlm.benchmarks.serving.servers import Server
from psannlm.reports.schemas.serving import SoakFigures

Kind = Literal["streamed", "whole", "stalled", "vanished", "rubbish"]
# What a client does, and how many of a hundred do it.
_WEIGHTS: dict[Kind, int] = {"streamed": 50, "whole": 20, "stalled": 8, "vanished": 12, "rubbish": 10}
# Kinds that must get an answer.
_ANSWERED: tuple[Kind, ...] = ("streamed", "whole", "stalled")
_SHORTEST_PROMPT_TOKENS = 4
_MEMORY_SAMPLES = 50
# Memory once the server has reached its working size, and at the end: fractions of the samples.
_EARLY, _LATE = (0.2, 0.4), (0.8, 1.0)


@dataclass
class Soaked:
    """Result of a soak, by number of the request."""

    answers: dict[int, Answer] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    unrefused: Counter[str] = field(default_factory=Counter)
    resident: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def figures(self, concurrency: int) -> SoakFigures:
        """Return the counts and the growth of memory as they are written."""
        early, late = (_part(self.resident, *edges) for edges in (_EARLY, _LATE))
        return SoakFigures(
            requests=sum(self.kinds.values()),
            concurrency=concurrency,
            seconds=self.seconds,
            kinds=dict(self.kinds),
            answered=len(self.answers),
            lost=sum(self.lost.values()),
            lost_for=dict(self.lost),
            unrefused=sum(self.unrefused.values()),
            unrefused_with=dict(self.unrefused),
            resident_bytes=self.resident,
            memory_growth=None if early is None or late is None else late / early - 1,
        )


def soak(
    server: Server,
    asked: Callable[[int, random.Random], Asked],
    *,
    n_requests: int,
    concurrency: int,
    timeout_s: float,
    seed: int,
    count: Callable[[int, int], None] = lambda done, total: None,
) -> Soaked:
    """Send ``n_requests`` of all kinds from ``concurrency`` clients and return what was answered, lost and refused.

    Args:
        asked: returns the request of a number, with random settings.
        seed: decides, with the number of a request, its kind and everything that the client does.
        count: called after every request.
    """
    done = Soaked()
    left = iter(range(n_requests))
    every = max(1, n_requests // _MEMORY_SAMPLES)

    async def client() -> None:
        while (number := next(left, None)) is not None:
            await _one(server, asked, number, seed, timeout_s, done)
            n_done = sum(done.kinds.values())
            count(n_done, n_requests)
            if n_done % every == 0 and (held := server.resident_bytes()) is not None:
                done.resident.append(held)

    async def clients() -> None:
        await asyncio.gather(*(client() for _ in range(concurrency)))

    began = time.monotonic()
    asyncio.run(clients())
    done.seconds = time.monotonic() - began
    return done


def draws(seed: int, number: int) -> random.Random:
    """Return the random numbers of one request."""
    return random.Random(f"{seed}/{number}")


def pick_kind(rng: random.Random) -> Kind:
    """Return what the client of a request does: the first random number of :func:`draws`."""
    return rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]


async def _one(
    server: Server,
    asked: Callable[[int, random.Random], Asked],
    number: int,
    seed: int,
    timeout_s: float,
    done: Soaked,
) -> None:
    """Make one request of its kind, and enter the outcome in ``done``."""
    rng = draws(seed, number)
    kind = pick_kind(rng)
    one = asked(number, rng)
    if kind == "vanished":
        try:
            await _vanish(server, server.completion_request(one.fields()), rng, timeout_s)
        except (OSError, asyncio.TimeoutError) as error:
            done.lost[f"{kind}: {type(error).__name__}"] += 1
    elif kind == "rubbish":
        await _send_rubbish(server, rng, timeout_s, done)
    else:
        is_streamed = kind == "streamed" or (kind == "stalled" and rng.random() < 0.7)
        request = server.completion_request(one.fields(is_streamed=is_streamed))
        if kind == "stalled":
            recording = await _stall(server, request, rng, timeout_s)
        else:
            recording = await exchange(server.address, request, timeout_s=timeout_s)
        answer = parse_completion(recording)
        if answer.failure:
            done.lost[f"{kind}: {answer.failure}"] += 1
        else:
            done.answers[number] = answer
    done.kinds[kind] += 1


class _Staller(Recorder):
    """Sends its request in two parts and stops reading for a while after the first bytes."""

    def __init__(self, request: bytes, cut: int, before_s: float, after_s: float) -> None:
        super().__init__(request)
        self.cut, self.before_s, self.after_s = cut, before_s, after_s

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first part now and the rest later."""
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self.request[: self.cut])
        asyncio.get_running_loop().call_later(self.before_s, self._send_rest)

    def _send_rest(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(self.request[self.cut :])

    def data_received(self, data: bytes) -> None:
        """Record bytes, and stop reading once."""
        super().data_received(data)
        if len(self.chunks) == 1:
            self.transport.pause_reading()
            asyncio.get_running_loop().call_later(self.after_s, self._read_on)

    def _read_on(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()


async def _stall(server: Server, request: bytes, rng: random.Random, timeout_s: float) -> Recording:
    """Send a request haltingly and read the response haltingly."""
    recording = Recording(time.perf_counter())
    loop = asyncio.get_running_loop()
    cut, before_s, after_s = rng.randrange(1, len(request)), rng.uniform(0.0, 0.5), rng.uniform(0.0, 2.0)
    try:
        transport, recorder = await loop.create_connection(
            lambda: _Staller(request, cut, before_s, after_s), server.address.host, server.address.port
        )
    except OSError as error:
        recording.failure, recording.ended_s = f"no connection: {error}", time.perf_counter()
        return recording
    recording.chunks = recorder.chunks
    try:
        recording.failure = await asyncio.wait_for(recorder.closed, timeout_s)
    except asyncio.TimeoutError:
        recording.failure = f"no end within {timeout_s:g} s"
    finally:
        transport.abort()
    recording.ended_s = time.perf_counter()
    return recording


async def _vanish(server: Server, request: bytes, rng: random.Random, timeout_s: float) -> None:
    """Connect, send none, a part or all of a request, read a part of the response or nothing, and vanish.

    Raises:
        OSError: the server cannot be reached, or resets the connection.
        asyncio.TimeoutError: it answers nothing within ``timeout_s``.
    """
    reader, writer = await asyncio.open_connection(server.address.host, server.address.port)
    stage = rng.randrange(4)
    if stage:
        writer.write(request[: rng.randrange(1, len(request))] if stage == 1 else request)
    if stage == 3:
        # Some bytes of the response have come; those who wait longer vanish in the middle of it.
        await asyncio.wait_for(reader.read(rng.choice((1, 400, 2000))), timeout_s)
    await asyncio.sleep(rng.choice((0.0, 0.01, 0.1)))
    if rng.random() < 0.5:
        writer.transport.abort()
    else:
        writer.close()


def rubbish(server: Server, rng: random.Random) -> bytes:
    """Return the bytes of a request that must be refused."""
    fields = {"model": server.model, "prompt": "Once", "max_tokens": 4}
    bodies: Sequence[dict[str, Any] | bytes] = (
        b"",
        b"{",
        b"[]",
        b"null",
        b'"prompt"',
        b"[" * 50_000,
        b"\xff\xfe{}",
        json.dumps(fields).encode()[:-1],
        {"model": server.model, "max_tokens": 4},
        {**fields, "prompt": 7},
        {**fields, "prompt": [[-1, 2]]},
        {**fields, "prompt": [10**9]},
        {**fields, "prompt": "x " * 100_000},
        {**fields, "max_tokens": -1},
        {**fields, "max_tokens": 10**9},
        {**fields, "max_tokens": "many"},
        {**fields, "temperature": -1},
        json.dumps({**fields, "temperature": float("nan")}).encode(),
        {**fields, "top_p": 7},
        {**fields, "seed": "s"},
        {**fields, "n": 10**6},
        {**fields, "stop": ["a"] * 100},
        {**fields, "logprobs": 10**6},
        {**fields, "stream": "perhaps"},
    )
    rest = (
        bytes(rng.randrange(256) for _ in range(rng.randrange(1, 200))) + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
        http_request(server.address, "DELETE", COMPLETIONS),
        http_request(server.address, "GET", "/v1/../etc/passwd"),
        http_request(server.address, "POST", "/v1/nothing", fields),
        http_request(server.address, "POST", COMPLETIONS, fields).replace(b"application/json", b"text/plain"),
        http_request(server.address, "POST", COMPLETIONS, fields).replace(b"Host: 127", b"Host: evil.example.127"),
        http_request(server.address, "POST", COMPLETIONS, b"x" * 3_000_000),
    )
    if rng.random() < 0.7:
        return http_request(server.address, "POST", COMPLETIONS, rng.choice(bodies))
    return rng.choice(rest)


async def _send_rubbish(server: Server, rng: random.Random, timeout_s: float, done: Soaked) -> None:
    """Send rubbish, which must be refused with 4xx or a closed connection."""
    request = rubbish(server, rng)
    response = parse_response(await exchange(server.address, request, timeout_s=timeout_s))
    if not (400 <= response.status < 500 or (response.status == 0 and not response.failure.startswith("no "))):
        first = request.partition(b"\r\n\r\n")
        shown = (first[2] or first[0])[:60].decode("ascii", errors="replace")
        done.unrefused[f"{response.failure or f'HTTP {response.status}'} after {shown!r}"] += 1


def _part(samples: Sequence[int], first: float, last: float) -> float | None:
    """Return the median of the samples between two fractions of them; None without any."""
    part = samples[int(first * len(samples)) : int(last * len(samples))]
    return statistics.median(part) if part else None

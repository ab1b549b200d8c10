"""Mutated bodies against the application in-process: every answer is one of the documented, none is a defect."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from psannlm.serving.app import build_app
from psannlm.serving.guard import HostRule
from psannlm.serving.scheduler import Scheduler
from psannlm.serving.service import Service

from .conftest import connect

VALID: dict[str, Any] = {
    "model": "tiny",
    "prompt": "The sea",
    "max_tokens": 1,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "seed": 3,
    "stop": ["a"],
    "logprobs": 2,
    "n": 1,
    "echo": True,
    "stream": False,
    "user": "me",
}
STRANGE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 6, 65, 1e308, -1e308, 5e-324, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0),
    *("", "x", "\x00", "\ud800", "\u202e", "𝕏" * 50, "a" * 5000, "1", "true", [], {}, [[]], [[], []], [{}], {"a": 1}),
    *([1], [1.5], [True], ["a", 1], [1, "a"], [[1], "a"], [[1], [2]], [["a"]], [10**30], [-1], [259], [260], [0] * 399),
    *([0] * 400, [0] * 500, ["a"] * 5, ["a"] * 129, [""], [None], ["\ud800"], {"include_usage": 1}, "The sea"),
]
ALLOWED = {200, 400, 404, 408, 413, 415, 429}


def mutated(draw: random.Random) -> bytes:
    """A body: a valid one with strange values, missing and unknown fields, or bytes that are not JSON."""
    body = dict(VALID)
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3, 3, 4])):
        name = draw.choice([*VALID, "suffix", "best_of", "logit_bias", "stream_options", "messages", "\ud800", ""])
        if draw.random() < 0.15:
            body.pop(name, None)
        else:
            body[name] = draw.choice(STRANGE)
    if draw.random() < 0.02:
        return draw.choice(
            [b"", b"null", b"[]", b"[" * 100_000, b'{"a":' * 5000, b'{"model": NaN}', b"\xff\xfe", b"1e999"]
        )
    text = json.dumps(body, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    if draw.random() < 0.3:
        at, size = draw.randrange(len(text)), draw.randrange(4)
        text = text[:at] + draw.randbytes(draw.randrange(4)) + text[at + size :]
    return text


@pytest.fixture(scope="module")
def ask(engine: Any, byte_tokenizer: Any) -> Iterator[Callable[[list[bytes]], list[tuple[int, bytes]]]]:
    """Return a function that posts bodies one after the other, and returns (status, answer) of each."""
    scheduler = Scheduler(engine, byte_tokenizer)
    is_ready = threading.Event()
    host, client = connect(lambda: scheduler, scheduler.limits, lambda: None)
    threads = [
        threading.Thread(target=host.run),
        threading.Thread(target=client.receive, args=(lambda kind: is_ready.set(),)),
    ]
    for thread in threads:
        thread.start()
    assert is_ready.wait(30)
    service = Service("tiny", byte_tokenizer, scheduler.limits.context, 100, client)
    app = build_app(service, HostRule("127.0.0.1"))

    async def post(body: bytes) -> tuple[int, bytes]:
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "headers": headers,
        }
        scope |= {"path": "/v1/completions", "raw_path": b"", "query_string": b"", "scheme": "http", "root_path": ""}
        sent: list[Any] = []
        is_read = False

        async def receive() -> dict[str, Any]:
            nonlocal is_read
            if is_read:
                await asyncio.sleep(3600)
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await asyncio.wait_for(app(scope, receive, send), 20)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])

    async def post_all(bodies: list[bytes]) -> list[tuple[int, bytes]]:
        return [await post(body) for body in bodies]

    yield lambda bodies: asyncio.run(post_all(bodies))
    client.close()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def assert_answers_explain(ask: Any, logged: pytest.LogCaptureFixture, seed: int, n: int) -> None:
    draw = random.Random(seed)
    bodies = [mutated(draw) for _ in range(n)]
    statuses: dict[int, int] = {}
    with logged.at_level(logging.INFO):
        for body, (status, answer) in zip(bodies, ask(bodies), strict=True):
            statuses[status] = statuses.get(status, 0) + 1
            assert status in ALLOWED, (status, body[:500], answer[:500])
            if status != 200:
                error = json.loads(answer)["error"]
                assert error["message"], body[:500]
                assert set(error) == {"message", "type", "param", "code"}
    assert statuses[200] > 0.05 * n
    assert statuses[400] > 0.3 * n
    # Neither a traceback nor a prompt.
    assert [record.message for record in logged.records if record.name.startswith("psannlm")] == []


def test_mutated_bodies_get_explained_errors(ask: Any, logged: pytest.LogCaptureFixture) -> None:
    assert_answers_explain(ask, logged, seed=0, n=400)


@pytest.mark.slow
def test_10000_mutated_bodies_get_explained_errors(ask: Any, logged: pytest.LogCaptureFixture) -> None:
    assert_answers_explain(ask, logged, seed=1, n=10_000)

"""Both ends of the connection between the HTTP process and the engine's: queue, updates, counters, and ends."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from psannlm.errors import GenerationError
from psannlm.generation.engine import Engine
from psannlm.generation.generate import complete_ids
from psannlm.generation.requests import SamplingConfig
from psannlm.serving.engine_client import EngineClient, QueueFullError
from psannlm.serving.engine_host import EngineHost
from psannlm.serving.messages import GenerationRequest, Update
from psannlm.serving.scheduler import Scheduler

from .conftest import connect

REQUEST = GenerationRequest([1, 5, 9], 30, SamplingConfig(seed=3))


class Pair:
    """Both ends, each with its thread."""

    def __init__(self, scheduler: Scheduler, **sizes: int) -> None:
        self.scheduler = scheduler
        self.told: list[str] = []
        self.host: EngineHost
        self.client: EngineClient
        self.host, self.client = connect(lambda: scheduler, scheduler.limits, lambda: None, **sizes)
        self.raised: list[BaseException] = []
        self.threads = [threading.Thread(target=self._run), threading.Thread(target=self._receive)]
        for thread in self.threads:
            thread.start()
        self.eventually(lambda: self.client.is_ready)

    def _run(self) -> None:
        try:
            self.host.run()
        except BaseException as error:  # noqa: BLE001, the test looks at it
            self.raised.append(error)

    def _receive(self) -> None:
        self.client.receive(self.told.append)

    def eventually(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def end(self) -> None:
        self.client.close()
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture
def pair(engine: Engine, byte_tokenizer: Any) -> Iterator[Callable[..., Pair]]:
    """Return a starter of both ends; its keywords are ``max_batch`` and ``max_queue``."""
    pairs = []

    def start(**sizes: int) -> Pair:
        pairs.append(Pair(Scheduler(engine, byte_tokenizer, max_batch=sizes.get("max_batch", 4)), **sizes))
        return pairs[-1]

    yield start
    for one in pairs:
        one.end()


def test_sequences_over_connection_equal_generate(
    pair: Callable[..., Pair], engine: Engine, byte_tokenizer: Any
) -> None:
    both = pair()
    requests = [replace(REQUEST, prompt=[1, *range(4, 4 + n)], n_top=2) for n in range(1, 9)]
    got: list[list[Update]] = [[] for _ in requests]
    both.client.submit(requests, lambda index, update: got[index].append(update))
    both.eventually(lambda: all(updates and updates[-1].is_last for updates in got))
    for request, updates in zip(requests, got, strict=True):
        (alone,) = complete_ids(
            engine, byte_tokenizer, [request.prompt], max_new_tokens=30, sampling=request.sampling, logprobs=2
        )
        assert [token for update in updates for token in update.ids] == alone.ids
        assert [scored for update in updates for scored in update.logprobs] == alone.logprobs
        assert "".join(update.text for update in updates) == alone.text


def test_full_queue_refuses_all_or_none(pair: Callable[..., Pair]) -> None:
    both = pair(max_batch=1, max_queue=2)
    client = both.client
    endless = replace(REQUEST, max_new_tokens=390, sampling=SamplingConfig(temperature=0.0))
    numbers = client.submit([endless] * 3, lambda index, update: None)
    with pytest.raises(QueueFullError, match="2 sequences wait"):
        client.submit([endless], lambda index, update: None)
    assert 1 <= client.expected_wait_s() <= 60
    # Their places are free at once.
    client.cancel(numbers[1:])
    with pytest.raises(QueueFullError):
        client.submit([endless] * 3, lambda index, update: None)
    client.cancel(client.submit([endless] * 2, lambda index, update: None) + numbers[:1])
    assert not client.has_work
    both.eventually(lambda: not both.scheduler.has_work)


def test_cancelled_sequence_leaves_the_engine_and_the_counters(pair: Callable[..., Pair]) -> None:
    both = pair()
    got: list[Update] = []
    endless = replace(REQUEST, max_new_tokens=390, sampling=SamplingConfig(temperature=0.0))
    numbers = both.client.submit([endless], lambda index, update: got.append(update))
    both.eventually(lambda: len(got) > 2)
    running = asyncio.run(both.client.counters())
    assert (running.n_running, running.n_waiting) == (1, 0)
    both.client.cancel(numbers)
    both.eventually(lambda: not both.scheduler.has_work)
    after = asyncio.run(both.client.counters())
    assert after.n_running == 0
    assert len(got) - 1 <= after.n_generated < 390
    assert not both.host._open


def test_refused_request_reaches_no_engine(pair: Callable[..., Pair]) -> None:
    both = pair()
    with pytest.raises(GenerationError, match="outside the vocabulary"):
        both.client.submit([REQUEST, replace(REQUEST, prompt=[260])], lambda index, update: None)
    assert not both.client.has_work
    assert asyncio.run(both.client.counters()).n_prompt_tokens == 0


def test_failed_engine_ends_sequences_then_server(pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    both = pair()

    def fail() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(both.scheduler, "step", fail)
    got: list[Update] = []
    both.client.submit([REQUEST], lambda index, update: got.append(update))
    both.eventually(lambda: "end" in both.told)
    assert str(got[-1].error) == "the server has failed"
    both.end()
    assert [str(error) for error in both.raised] == ["out of memory"]


def test_messages_of_http_process_are_logged(pair: Callable[..., Pair], caplog: pytest.LogCaptureFixture) -> None:
    both = pair()
    with caplog.at_level(logging.INFO):
        both.client.report("log", (logging.ERROR, "%s", "100 % wrong"))
        both.eventually(lambda: bool(caplog.records))
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(logging.ERROR, "100 % wrong")]


def test_message_cut_short_ends_the_host(pair: Callable[..., Pair]) -> None:
    both = pair()
    # A message of 100 bytes of which 3 arrive: the connection raises neither EOFError nor ConnectionError.
    os.write(both.client._connection.fileno(), (100).to_bytes(4, "big") + b"abc")
    both.client.close()
    for thread in both.threads:
        thread.join(20)
        assert not thread.is_alive()
    assert both.raised == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_update_that_cannot_be_taken_ends_the_client(pair: Callable[..., Pair]) -> None:
    both = pair()

    def fail(number: int, update: Update) -> None:
        raise ValueError("no")

    both.client.submit([REQUEST], fail)
    both.threads[1].join(20)
    assert not both.threads[1].is_alive()
    assert both.told[-1] == "end"

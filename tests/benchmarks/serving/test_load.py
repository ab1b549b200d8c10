"""Loads: closed loops of C clients, open loops of Poisson arrivals, both bounded in requests and time."""

from __future__ import annotations

import asyncio
import itertools
import statistics

import pytest

from psannlm.benchmarks.serving.exchange import Recording
from psannlm.benchmarks.serving.load import Level, draw_prompts, poisson_arrivals, run_load

pytest.importorskip("h11")


class Sent:
    """Requests that were sent, each of which takes some turns of the event loop; ``most`` were under way at once."""

    def __init__(self, turns: int = 3) -> None:
        self.turns, self.now, self.most = turns, 0, 0
        self.numbers: list[int] = []
        self.due: list[float | None] = []

    async def __call__(self, number: int, due_s: float | None) -> Recording:
        self.numbers.append(number)
        self.due.append(due_s)
        self.now += 1
        self.most = max(self.most, self.now)
        for _ in range(self.turns):
            await asyncio.sleep(0)
        self.now -= 1
        return Recording(due_s or 0.0, [], 1.0, "nobody answers")


@pytest.mark.parametrize("concurrency", [1, 5])
def test_closed_loop_keeps_every_client_busy(concurrency: int) -> None:
    send = Sent()
    run = run_load(send, Level(concurrency), 23, seconds=60.0, seed=1, first=100)
    assert send.numbers == list(range(100, 123))
    assert send.most == concurrency
    assert list(run.answers) == send.numbers
    assert run.failures == {"nobody answers": 23}
    assert run.completed == []


def test_closed_loop_stops_sending_after_its_seconds() -> None:
    times = iter(range(1000))
    send = Sent()
    run = run_load(send, Level(2), 100, seconds=10.0, seed=1, clock=lambda: float(next(times)))
    assert 2 <= len(run.answers) <= 10


def test_poisson_arrivals_have_the_rate_and_variance() -> None:
    arrivals = poisson_arrivals(4.0, 4001, 7)
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert arrivals[0] == 0.0
    assert min(gaps) >= 0.0
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.06)
    # Of an exponential distribution, mean and standard deviation are equal; of even arrivals, the latter is zero.
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.06)
    assert arrivals == poisson_arrivals(4.0, 4001, 7)
    assert arrivals != poisson_arrivals(4.0, 4001, 8)


def test_open_loop_counts_latency_from_due_time() -> None:
    send = Sent()
    run_load(send, Level(rate=1000.0), 20, seconds=60.0, seed=3)
    due = sorted(moment for moment in send.due if moment is not None)
    gaps = [moment - due[0] for moment in due]
    assert gaps == pytest.approx(poisson_arrivals(1000.0, 20, 3), abs=1e-9)


def test_open_loop_sends_none_due_after_its_seconds() -> None:
    send = Sent()
    run_load(send, Level(rate=1000.0), 1000, seconds=0.02, seed=3)
    assert len(send.numbers) == sum(arrival < 0.02 for arrival in poisson_arrivals(1000.0, 1000, 3))


def test_prompts_have_the_length_asked_for(byte_tokenizer) -> None:  # type: ignore[no-untyped-def]
    prompts = draw_prompts(["The tide is out, and the boats lie on the sand."], byte_tokenizer, 90, 30, seed=1)
    assert {1 + len(byte_tokenizer.encode(prompt)) for prompt in prompts} == {90}
    assert len(set(prompts)) > 15
    assert prompts == draw_prompts(["The tide is out, and the boats lie on the sand."], byte_tokenizer, 90, 30, seed=1)

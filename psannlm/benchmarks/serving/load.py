"""Closed-loop and open-loop load of completion requests, a function of a seed.

In a closed loop, each of C clients sends its next request when the last one has been answered. In an open loop,
requests arrive by a Poisson process whether or not earlier ones have been answered, and the latency of each counts from
the moment at which it was due: a server that falls behind cannot slow down its own load.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from psannlm.benchmarks.harness.interleaved import Clock, Count
from psannlm.benchmarks.serving.exchange import Answer, Recording, parse_completion
from psannlm.tokenizers.base import Tokenizer

# How a load sends request number n, which was due at a time of the clock (None: now).
Send = Callable[[int, float | None], Awaitable[Recording]]
_TRIES = 20


@dataclass(frozen=True)
class Level:
    """How hard a server is loaded: ``concurrency`` clients in a closed loop, or ``rate`` requests per second."""

    concurrency: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g} requests/s"
        return f"{self.concurrency} client{'' if self.concurrency == 1 else 's'}"


@dataclass(frozen=True)
class LoadRun:
    """Answers to one load, by the number of the request, and its seconds from the first request to the last answer."""

    answers: dict[int, Answer]
    seconds: float

    @property
    def completed(self) -> list[Answer]:
        """The whole completions."""
        return [answer for answer in self.answers.values() if not answer.failure]

    @property
    def failures(self) -> dict[str, int]:
        """How many requests failed for which reason."""
        reasons = [answer.failure for answer in self.answers.values() if answer.failure]
        return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


def draw_prompts(texts: Sequence[str], tokenizer: Tokenizer, n_tokens: int, n_prompts: int, seed: int) -> list[str]:
    """Return prompts that are cut from ``texts`` at random, of ``n_tokens`` tokens each with the BOS token.

    A cut may be tokenized otherwise than the text around it; the nearest of some cuts is taken then.
    """
    rng = random.Random(seed)
    text = "\n".join(texts)
    prompts = []
    for _ in range(n_prompts):
        found = ""
        for _ in range(_TRIES):
            at = rng.randrange(len(text))
            # A token has a dozen characters at most in nearly all text; a text that is too short is repeated.
            ids = tokenizer.encode((text[at:] + text * (1 + 12 * n_tokens // len(text)))[: 12 * n_tokens])
            found = tokenizer.decode(ids[: n_tokens - 1])
            if len(tokenizer.encode(found)) == n_tokens - 1:
                break
        prompts.append(found)
    return prompts


def poisson_arrivals(rate: float, n_requests: int, seed: int) -> list[float]:
    """Return the seconds at which the requests of a Poisson process of ``rate`` per second arrive, from 0."""
    rng = random.Random(seed)
    at, arrivals = 0.0, []
    for _ in range(n_requests):
        arrivals.append(at)
        at += rng.expovariate(rate)
    return arrivals


def run_load(
    send: Send,
    level: Level,
    n_requests: int,
    *,
    seconds: float,
    seed: int,
    first: int = 0,
    count: Count = lambda done, total: None,
    clock: Clock = time.perf_counter,
) -> LoadRun:
    """Send at most ``n_requests`` requests, numbered from ``first``, and return their answers.

    Args:
        send: sends a request and returns its recording.
        seconds: after these, no further request is sent; those that are under way end.
        seed: of the arrivals of an open loop.
        count: called after every answer.
    """
    began = clock()
    recordings: dict[int, Recording] = {}

    async def one(number: int, due_s: float | None) -> None:
        recordings[number] = await send(number, due_s)
        count(len(recordings), n_requests)

    numbers = range(first, first + n_requests)
    if level.rate is None:
        work = _closed_loop(one, numbers, level.concurrency or 1, began + seconds, clock)
    else:
        arrivals = [began + arrival for arrival in poisson_arrivals(level.rate, n_requests, seed)]
        work = _open_loop(one, numbers, [due for due in arrivals if due < began + seconds], clock)
    asyncio.run(work)
    ended = max((recording.ended_s for recording in recordings.values()), default=began)
    answers = {number: parse_completion(recording) for number, recording in sorted(recordings.items())}
    return LoadRun(answers, ended - began)


async def _closed_loop(
    one: Callable[[int, float | None], Awaitable[None]],
    numbers: Iterable[int],
    concurrency: int,
    deadline: float,
    clock: Clock,
) -> None:
    left = iter(numbers)

    async def client() -> None:
        while clock() < deadline and (number := next(left, None)) is not None:
            await one(number, None)

    await asyncio.gather(*(client() for _ in range(concurrency)))


async def _open_loop(
    one: Callable[[int, float | None], Awaitable[None]], numbers: Iterable[int], arrivals: Sequence[float], clock: Clock
) -> None:
    async def at(number: int, due_s: float) -> None:
        await asyncio.sleep(max(0.0, due_s - clock()))
        await one(number, due_s)

    await asyncio.gather(*(at(number, due_s) for number, due_s in zip(numbers, arrivals, strict=False)))

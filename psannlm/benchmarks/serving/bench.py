"""Serving benchmark: our server and reference servers under the same loads, in turns, beside the engine's own batch."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from psannlm.benchmarks.harness.interleaved import Clock, Count, run_interleaved
from psannlm.benchmarks.harness.isolated_process import IsolatedProcess
from psannlm.benchmarks.serving.exchange import Answer, Recording
from psannlm.benchmarks.serving.load import Level, LoadRun, draw_prompts, run_load
from psannlm.benchmarks.serving.own_engine import ENVIRONMENT, Asked, Expected, OwnEngine
from psannlm.benchmarks.serving.report import ServingReport, ServingSettings, new_tokens_of
from psannlm.benchmarks.serving.servers import OURS, Server, ServerSpec
from psannlm.benchmarks.serving.soak import draws, pick_kind, soak
from psannlm.benchmarks.serving.subject import Subject
from psannlm.data.corpus.documents import builtin_documents
from psannlm.reports.schemas.serving import AnswerCheck, ServedBy
from psannlm.runtime.progress import OnProgress, Progress, ignore_progress

# Distinct prompts of a benchmark; requests take them in turns, each with a seed of its own.
_N_PROMPTS = 256
_ENGINE = "the engine's own batch"


class Engine(Protocol):
    """An :class:`OwnEngine` whose methods are called by name."""

    def call(self, method: str, *arguments: Any) -> Any:
        """Call ``method`` and return its result."""
        ...


EngineBuilder = Callable[[Subject, str, bool, str], AbstractContextManager[Engine]]


def isolated_engine(subject: Subject, dtype: str, is_compiled: bool, device: str) -> AbstractContextManager[Engine]:
    """Return the engine in a process of its own, which leaving the context ends."""
    return IsolatedProcess(OwnEngine, subject.file, dtype, is_compiled, device, environment=ENVIRONMENT)


def bench_serve(
    subject: Subject,
    specs: Sequence[ServerSpec],
    settings: ServingSettings,
    *,
    device: str = "cpu",
    build_engine: EngineBuilder = isolated_engine,
    on_progress: OnProgress = ignore_progress,
    on_interrupt: Callable[[ServingReport], None] = lambda report: None,
    clock: Clock = time.perf_counter,
) -> ServingReport:
    """Start the servers, load them in turns, compare answers of ours with the engine's own, and stop them.

    Failed requests and wrong answers are not errors here: the report's ``problems`` list them.

    Args:
        specs: our server first, then the reference servers.
        device: of the engine.
        build_engine: starts the engine that computes the right answers.
        on_interrupt: called with the figures so far when the user interrupts the loads, which ends in
            KeyboardInterrupt.

    Raises:
        WorkerError: a server did not start, or ended under load; the message has what it printed.
    """
    texts = [document.text for document in builtin_documents()]
    prompts = draw_prompts(texts, subject.tokenizer, settings.prompt_tokens, _N_PROMPTS, settings.seed)
    asked = partial(_asked, prompts, settings)
    report = ServingReport(settings, subject, device, 0, [], {})
    with ExitStack() as stack:
        on_progress(Progress("starting the engine"))
        engine = stack.enter_context(build_engine(subject, settings.dtype, settings.is_compiled, device))
        servers = []
        for spec in specs:
            on_progress(Progress(f"starting {spec.name}"))
            servers.append(stack.enter_context(Server(spec)))
        report = replace(report, threads=engine.call("threads"))
        candidates: dict[str, Callable[[Count], Any]] = {}
        keys: dict[str, tuple[Server, Level]] = {}
        for level in settings.levels:
            for server in servers:
                name = f"{server.spec.name}, {level}"
                keys[name] = (server, level)
                candidates[name] = partial(_load, server, level, settings, asked, clock)
            if level == Level(settings.max_batch):
                candidates[_ENGINE] = partial(_engine_batch, engine, settings, asked)

        def keep(name: str, is_warm_up: bool, result: Any) -> None:
            if name not in keys:
                report.engine_runs.append(result)
                return
            server, level = keys[name]
            server.require_alive()
            report.runs.setdefault((server.spec.name, level), []).append(result)
            if (held := server.resident_bytes()) is not None:
                report.resident.setdefault((server.spec.name, level), []).append(held)

        _warm_up(servers, engine, settings, asked, on_progress)
        try:
            run_interleaved(
                candidates,
                settings.repeats,
                warm_ups=0,
                unit="requests",
                clock=clock,
                on_progress=on_progress,
                on_result=keep,
            )
        except KeyboardInterrupt:
            on_interrupt(replace(report, is_complete=False))
            raise
        on_progress(Progress("comparing answers with the engine's own"))
        check = check_answers(engine, report.runs, asked, settings)
        on_progress(Progress("stopping the servers"))
        served = [_stopped(server) for server in servers]
    return replace(report, servers=served, check=check)


def _stopped(server: Server) -> ServedBy:
    """Stop a server and return its description."""
    return ServedBy(
        name=server.spec.name,
        description=server.spec.description,
        ready_s=server.ready_s,
        exit_code=server.stop(),
    )


def _asked(prompts: Sequence[str], settings: ServingSettings, number: int) -> Asked:
    """Return request ``number``: a function of it and of the seed."""
    return Asked(prompts[number % len(prompts)], settings.new_tokens, settings.temperature, settings.seed + number)


def _load(
    server: Server,
    level: Level,
    settings: ServingSettings,
    asked: Callable[[int], Asked],
    clock: Clock,
    count: Count,
) -> LoadRun:
    async def send(number: int, due_s: float | None) -> Recording:
        return await server.send(asked(number).fields(), timeout_s=settings.timeout_s, due_s=due_s)

    return run_load(
        send,
        level,
        settings.requests_at(level),
        seconds=settings.seconds,
        seed=settings.seed,
        count=count,
        clock=clock,
    )


def _engine_batch(
    engine: Engine, settings: ServingSettings, asked: Callable[[int], Asked], count: Count
) -> tuple[int, float]:
    """Decode as many batches as the server at this level has requests, and return their new tokens and seconds."""
    n_batches = max(1, settings.requests_at(Level(settings.max_batch)) // settings.max_batch)
    n_tokens, seconds = 0, 0.0
    for batch in range(n_batches):
        numbers = range(batch * settings.max_batch, (batch + 1) * settings.max_batch)
        tokens, elapsed = engine.call("batch", [asked(number) for number in numbers])
        n_tokens, seconds = n_tokens + tokens, seconds + elapsed
        count((batch + 1) * settings.max_batch, n_batches * settings.max_batch)
    return n_tokens, seconds


def _warm_up(
    servers: Sequence[Server],
    engine: Engine,
    settings: ServingSettings,
    asked: Callable[[int], Asked],
    on_progress: OnProgress,
) -> None:
    """Load each server and the engine once at full batch size, uncounted; a compiled step takes up to a minute."""
    on_progress(Progress("warming up the engine"))
    engine.call("batch", [asked(number) for number in range(settings.max_batch)])
    for server in servers:
        on_progress(Progress(f"warming up {server.spec.name}"))
        n_clients = settings.max_batch if server.spec.name == OURS else 1

        async def send(number: int, due_s: float | None, server: Server = server) -> Recording:
            return await server.send(asked(number).fields(), timeout_s=settings.timeout_s)

        run_load(send, Level(n_clients), n_clients, seconds=settings.timeout_s, seed=settings.seed)
        server.require_alive()


def check_answers(
    engine: Engine,
    runs: Mapping[tuple[str, Level], Sequence[LoadRun]],
    asked: Callable[[int], Asked],
    settings: ServingSettings,
) -> AnswerCheck | None:
    """Compare a random sample of our server's whole answers with the engine's own; None for a sample of none."""
    answered = [
        (f"request {number} at {level}", asked(number), answer)
        for (server, level), made in runs.items()
        if server == OURS
        for run in made
        for number, answer in run.answers.items()
        if not answer.failure
    ]
    return _compare(engine, answered, settings)


def _compare(
    engine: Engine, answered: Sequence[tuple[str, Asked, Answer]], settings: ServingSettings
) -> AnswerCheck | None:
    """Compare a random sample of named answers."""
    sample = random.Random(settings.seed).sample(answered, min(settings.n_checked, len(answered)))
    if not sample:
        return None
    wrong = []
    for name, asked, answer in sample:
        (right,) = engine.call("answers", [asked])
        if difference := difference_of(answer, right, asked.max_tokens):
            wrong.append(f"{name}: {difference}")
    return AnswerCheck(compared=len(sample), wrong=len(wrong), first_difference=wrong[0] if wrong else "")


def difference_of(answer: Answer, right: Expected, max_tokens: int) -> str:
    """Return how an answer differs from the right one; empty if it does not."""
    if answer.text != right.text:
        same = next(
            (at for at, (a, b) in enumerate(zip(answer.text, right.text, strict=False)) if a != b),
            min(len(answer.text), len(right.text)),
        )
        served, expected = answer.text[same : same + 20], right.text[same : same + 20]
        return f"after {same:,} equal characters, {served!r} was served and {expected!r} is right"
    if answer.finish_reason != right.finish_reason:
        return f"finish reason {answer.finish_reason!r} was served and {right.finish_reason!r} is right"
    if new_tokens_of(answer, max_tokens) != right.n_tokens:
        return f"{answer.n_tokens} new tokens were reported and {right.n_tokens} are right"
    return ""


def soak_server(
    subject: Subject,
    spec: ServerSpec,
    settings: ServingSettings,
    *,
    device: str = "cpu",
    build_engine: EngineBuilder = isolated_engine,
    on_progress: OnProgress = ignore_progress,
) -> ServingReport:
    """Start our server, soak it at the first level of ``settings``, compare answers, and stop it.

    Prompts, new tokens and sampling vary up to those of ``settings``. What does not hold is in the report's
    ``problems``.

    Raises:
        WorkerError: the server did not start, or ended under load; the message has what it printed.
    """
    texts = [document.text for document in builtin_documents()]
    lengths = (4, max(4, settings.prompt_tokens // 2), settings.prompt_tokens)
    prompts = [
        prompt
        for n_tokens in lengths
        for prompt in draw_prompts(texts, subject.tokenizer, n_tokens, _N_PROMPTS // 2, settings.seed)
    ]

    def asked(number: int, rng: random.Random) -> Asked:
        temperature, top_p = rng.choice(((0.0, 1.0), (0.8, 1.0), (1.2, 0.9)))
        seed = rng.randrange(2**31)
        return Asked(rng.choice(prompts), rng.randint(1, settings.new_tokens), temperature, seed, top_p)

    level = settings.levels[0]
    n_requests = settings.requests_at(level)
    with ExitStack() as stack:
        on_progress(Progress("starting the engine"))
        engine = stack.enter_context(build_engine(subject, settings.dtype, settings.is_compiled, device))
        on_progress(Progress(f"starting {spec.name}"))
        server = stack.enter_context(Server(spec))
        began = time.monotonic()

        def count(done: int, total: int) -> None:
            elapsed_s = time.monotonic() - began
            left_s = elapsed_s * (total - done) / done
            on_progress(Progress("soaking", done, total, "requests", elapsed_s, left_s))

        done = soak(
            server,
            asked,
            n_requests=n_requests,
            concurrency=level.concurrency or 1,
            timeout_s=settings.timeout_s,
            seed=settings.seed,
            count=count,
        )
        server.require_alive()
        ready_s, exit_code = server.ready_s, server.stop()
        on_progress(Progress("comparing answers with the engine's own"))
        answered = []
        for number, answer in done.answers.items():
            rng = draws(settings.seed, number)
            pick_kind(rng)
            answered.append((f"request {number}", asked(number, rng), answer))
        check = _compare(engine, answered, settings)
        threads = engine.call("threads")
    served = ServedBy(name=spec.name, description=spec.description, ready_s=ready_s, exit_code=exit_code)
    figures = done.figures(level.concurrency or 1)
    return ServingReport(settings, subject, device, threads, [served], {}, check=check, soak=figures)

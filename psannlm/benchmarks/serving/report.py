"""Result of the serving benchmark: figures of each server and level, ratios between them, and what did not hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from psannlm.benchmarks.harness.interleaved import paired_ratio, shared_rounds
from psannlm.benchmarks.serving.exchange import Answer
from psannlm.benchmarks.serving.load import Level, LoadRun
from psannlm.benchmarks.serving.servers import OURS
from psannlm.benchmarks.serving.subject import Subject
from psannlm.errors import ConfigError
from psannlm.reports.schemas.measured import Spread
from psannlm.reports.schemas.serving import (
    AnswerCheck,
    EngineBatch,
    Percentiles,
    ServedBy,
    ServingMetrics,
    ServingRow,
    SoakFigures,
)

# Requests of a load for each of its clients, so that ramping up and down is a small part of it.
_REQUESTS_PER_CLIENT, _FEWEST_REQUESTS = 4, 8
_OPEN_LOOP_REQUESTS = 64
MOST_MEMORY_GROWTH = 0.05


@dataclass(frozen=True)
class ServingSettings:
    """What to measure.

    Attributes:
        levels: of load, each measured on its own.
        n_requests: of each load; None: four for each client, and 64 in an open loop.
        seconds: after which a load sends no further request.
        prompt_tokens, new_tokens: of each request.
        repeats: runs of each load.
        n_checked: answers that are compared with the engine's own.
        against: reference servers, by name.
    """

    levels: tuple[Level, ...]
    n_requests: int | None = None
    seconds: float = 60.0
    prompt_tokens: int = 96
    new_tokens: int = 64
    temperature: float = 0.8
    dtype: str = "float32"
    is_compiled: bool = False
    max_batch: int = 16
    repeats: int = 3
    n_checked: int = 16
    against: tuple[str, ...] = ()
    seed: int = 1337
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        """Refuse settings that no load can have. Raises ConfigError."""
        if not self.levels:
            raise ConfigError("--concurrency names no number of clients; write 1,4,16,64")
        if self.against and self.dtype == "int8":
            raise ConfigError("--dtype int8 has no counterpart in the reference servers; leave out --against")

    def requests_at(self, level: Level) -> int:
        """Return the number of requests of a load."""
        if self.n_requests is not None:
            return self.n_requests
        if level.concurrency is None:
            return _OPEN_LOOP_REQUESTS
        return max(_FEWEST_REQUESTS, _REQUESTS_PER_CLIENT * level.concurrency)


def new_tokens_of(answer: Answer, max_tokens: int) -> int:
    """Return the new tokens of a whole completion.

    A server that does not report them has sent all that were asked for, if length ended it, or else, mostly, one part
    of text for each.
    """
    if answer.n_tokens is not None:
        return answer.n_tokens
    return max_tokens if answer.finish_reason == "length" else len(answer.arrivals_s)


@dataclass(frozen=True)
class ServingReport:
    """Runs of every server and level, and of the engine's own batch; ratios are paired run by run.

    Attributes:
        runs: by name of the server and level.
        resident: memory in bytes after each run, where it is known.
        engine_runs: (new tokens, seconds) of each batch of the engine.
    """

    settings: ServingSettings
    subject: Subject
    device: str
    threads: int
    servers: list[ServedBy]
    runs: dict[tuple[str, Level], list[LoadRun]]
    resident: dict[tuple[str, Level], list[int]] = field(default_factory=dict)
    engine_runs: list[tuple[int, float]] = field(default_factory=list)
    check: AnswerCheck | None = None
    soak: SoakFigures | None = None
    is_complete: bool = True

    def throughputs(self, server: str, level: Level) -> list[float]:
        """Return the new tokens per second of each run."""
        return [
            sum(new_tokens_of(answer, self.settings.new_tokens) for answer in run.completed) / run.seconds
            for run in self.runs.get((server, level), [])
        ]

    def over_reference(self, server: str, level: Level) -> Spread | None:
        """Return our throughput over that of a reference server at one level; None where it answered nothing."""
        return _ratio(self.throughputs(OURS, level), self.throughputs(server, level))

    def over_one_client(self) -> dict[str, Spread]:
        """Return our throughput at each level over that of one client."""
        one = self.throughputs(OURS, Level(1))
        ratios = {str(level): _ratio(self.throughputs(OURS, level), one) for level in self.settings.levels}
        return {name: ratio for name, ratio in ratios.items() if ratio is not None and name != str(Level(1))}

    def engine_batch(self) -> EngineBatch | None:
        """Return the engine's own throughput, and our server's with as many clients over it."""
        if not self.engine_runs:
            return None
        own = [n_tokens / seconds for n_tokens, seconds in self.engine_runs]
        served = self.throughputs(OURS, Level(self.settings.max_batch))
        return EngineBatch(
            batch_size=self.settings.max_batch, tokens_per_s=Spread.of(own), served_over_it=_ratio(served, own)
        )

    @property
    def problems(self) -> list[str]:
        """One line for each property of our server that did not hold."""
        found = []
        for (server, level), runs in self.runs.items():
            reasons = [f"{count} x {reason}" for run in runs for reason, count in run.failures.items()]
            if server == OURS and reasons:
                found.append(f"{level}: requests failed: {', '.join(sorted(set(reasons)))}")
        if self.check is not None and self.check.wrong:
            wrong = f"{self.check.wrong:,} of {self.check.compared:,} answers differ from the engine's own"
            found.append(f"{wrong}: {self.check.first_difference}")
        found += [] if self.soak is None else soak_problems(self.soak)
        for served in self.servers:
            if served.name == OURS and served.exit_code not in (0, None):
                found.append(f"our server ended with exit code {served.exit_code} after SIGTERM")
        return found

    def metrics(self) -> ServingMetrics:
        """Return settings, figures and ratios as they are written."""
        settings, subject = self.settings, self.subject
        return ServingMetrics(
            model=subject.config.model_dump(mode="json"),
            weights=subject.weights,
            parameters=subject.parameters,
            dtype=settings.dtype,
            is_compiled=settings.is_compiled,
            device=self.device,
            threads=self.threads,
            prompt_tokens=settings.prompt_tokens,
            new_tokens=settings.new_tokens,
            temperature=settings.temperature,
            requests=settings.n_requests,
            seconds=settings.seconds,
            max_batch=settings.max_batch,
            repeats=settings.repeats,
            seed=settings.seed,
            against=list(settings.against),
            servers=self.servers,
            rows=[self._row(server, level) for server, level in self.runs],
            engine_batch=self.engine_batch(),
            over_one_client=self.over_one_client(),
            check=self.check,
            soak=self.soak,
            is_complete=self.is_complete,
            problems=self.problems,
        )

    def _row(self, server: str, level: Level) -> ServingRow:
        runs = self.runs[server, level]
        rates = [rate for rate in self.throughputs(server, level) if rate > 0]
        failures: dict[str, int] = {}
        for run in runs:
            for reason, count in run.failures.items():
                failures[reason] = failures.get(reason, 0) + count
        is_ours = server == OURS
        ours, its = (_p95_first_tokens(self.runs.get((name, level), [])) for name in (OURS, server))
        return ServingRow(
            server=server,
            concurrency=level.concurrency,
            rate=level.rate,
            runs=len(runs),
            requests=sum(len(run.answers) for run in runs),
            failed=sum(failures.values()),
            failures=failures,
            new_tokens=sum(new_tokens_of(one, self.settings.new_tokens) for run in runs for one in run.completed),
            tokens_per_s=Spread.of(rates) if rates else None,
            first_token_s=Percentiles.of([first_tokens_s(run) for run in runs]),
            between_tokens_s=Percentiles.of([gaps_s(run) for run in runs]),
            request_s=Percentiles.of([[answer.total_s for answer in run.completed] for run in runs]),
            resident_bytes=max(self.resident.get((server, level), []), default=None),
            our_tokens_per_s_over_its=None if is_ours else self.over_reference(server, level),
            our_first_token_p95_over_its=None if is_ours else _ratio(ours, its),
        )


def first_tokens_s(run: LoadRun) -> list[float]:
    """Return the seconds to the first text of each whole completion that has text."""
    return [answer.arrivals_s[0] for answer in run.completed if answer.arrivals_s]


def gaps_s(run: LoadRun) -> list[float]:
    """Return the seconds between successive parts of text, of all whole completions."""
    pairs = (zip(answer.arrivals_s, answer.arrivals_s[1:], strict=False) for answer in run.completed)
    return [later - earlier for parts in pairs for earlier, later in parts]


def _p95_first_tokens(runs: Sequence[LoadRun]) -> list[float]:
    each = [Percentiles.of([first_tokens_s(run)]) for run in runs]
    return [found.p95.median for found in each if found is not None]


def _ratio(above: Sequence[float], below: Sequence[float]) -> Spread | None:
    """Return the ratio run by run; None without runs, or where one of those below is zero."""
    above, below = shared_rounds(above, below)
    return paired_ratio(above, below) if above and all(below) else None


def soak_problems(figures: SoakFigures) -> list[str]:
    """Return a line for each property that did not hold."""
    found = []
    if figures.lost:
        reasons = ", ".join(f"{count:,} x {reason}" for reason, count in figures.lost_for.items())
        found.append(f"{figures.lost:,} of {figures.requests:,} requests lost: {reasons}")
    if figures.unrefused:
        reasons = ", ".join(f"{count:,} x {reason}" for reason, count in list(figures.unrefused_with.items())[:3])
        found.append(f"{figures.unrefused:,} requests of rubbish not refused: {reasons}")
    if figures.memory_growth is not None and figures.memory_growth > MOST_MEMORY_GROWTH:
        found.append(f"memory grew by {figures.memory_growth:.1%}, more than {MOST_MEMORY_GROWTH:.0%}")
    return found

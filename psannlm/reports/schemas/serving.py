"""Schema of a serving benchmark (``reports/serving/<ts>/metrics.json``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any

import numpy as np
from pydantic.dataclasses import dataclass

from psannlm.io.artifact_schema import Figure, Figures, Flag, OptionalFigure, Whole
from psannlm.reports.schemas.measured import Spread

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Percentiles(Figures):
    """Percentiles of the latencies of a load, in seconds, each with its spread over the runs."""

    p50: Spread
    p95: Spread
    p99: Spread

    @classmethod
    def of(cls, runs: Sequence[Sequence[float]]) -> Percentiles | None:
        """Return the percentiles of each run's values, interpolated linearly; None where no run has any."""
        values = [run for run in runs if run]
        if not values:
            return None
        return cls(*(Spread.of([float(np.percentile(run, p)) for run in values]) for p in PERCENTILES))


@dataclass(frozen=True, kw_only=True)
class ServingRow(Figures):
    """A server at one level of load: ``concurrency`` clients in a closed loop, or ``rate`` requests per second.

    Attributes:
        requests, failed: of all runs.
        failures: how many failed for which reason.
        tokens_per_s: new tokens of all answers per second; None where no request was answered.
        first_token_s: from the request to the first text; of a request that waits, waiting included.
        between_tokens_s: between two parts of a text, each of one or a few tokens.
        request_s: from the request to the end of the answer.
        resident_bytes: largest memory of the server and its child processes after a run; None where unknown.
        our_tokens_per_s_over_its, our_first_token_p95_over_its: paired by run; None for our own server.
    """

    server: str
    concurrency: Whole | None
    rate: OptionalFigure
    runs: Whole
    requests: Whole
    failed: Whole
    failures: dict[str, Whole]
    new_tokens: Whole
    tokens_per_s: Spread | None
    first_token_s: Percentiles | None
    between_tokens_s: Percentiles | None
    request_s: Percentiles | None
    resident_bytes: Whole | None
    our_tokens_per_s_over_its: Spread | None = None
    our_first_token_p95_over_its: Spread | None = None

    @property
    def level(self) -> str:
        """The level of load as text."""
        if self.rate is not None:
            return f"{self.rate:g} requests/s"
        return f"{self.concurrency:,} client{'' if self.concurrency == 1 else 's'}"


@dataclass(frozen=True, kw_only=True)
class ServedBy(Figures):
    """A server: what it is, the seconds until it took requests, and its exit code after SIGTERM."""

    name: str
    description: str
    ready_s: Figure
    exit_code: Whole | None


@dataclass(frozen=True, kw_only=True)
class EngineBatch(Figures):
    """Our engine decoding batches of ``batch_size`` prompts without a server, in turns with the loads.

    ``served_over_it`` is our server's throughput with as many clients over its own.
    """

    batch_size: Whole
    tokens_per_s: Spread
    served_over_it: Spread | None


@dataclass(frozen=True, kw_only=True)
class AnswerCheck(Figures):
    """Answers of our server under load compared with what the engine generates alone: texts, reasons and counts."""

    compared: Whole
    wrong: Whole
    first_difference: str = ""


@dataclass(frozen=True, kw_only=True)
class SoakFigures(Figures):
    """Thousands of requests at once, among them clients that vanish, stall and send rubbish.

    Attributes:
        kinds: how many requests of each kind were made.
        answered: well-behaved requests with a whole answer.
        lost, lost_for: well-behaved requests without one, and why.
        unrefused, unrefused_with: requests of rubbish that were not refused, and what the server did.
        resident_bytes: memory of the server and its child processes, at even steps of the work.
        memory_growth: median of the last fifth of these over that after the first fifth, less one; None where unknown.
    """

    requests: Whole
    concurrency: Whole
    seconds: Figure
    kinds: dict[str, Whole]
    answered: Whole
    lost: Whole
    lost_for: dict[str, Whole]
    unrefused: Whole
    unrefused_with: dict[str, Whole]
    resident_bytes: list[Whole]
    memory_growth: OptionalFigure


@dataclass(frozen=True, kw_only=True)
class ServingMetrics(Figures):
    """The whole file: settings, machine, servers, a row for each of them and each level, and what did not hold.

    ``over_one_client`` is our throughput at each number of clients over that of one client, paired by run. Without
    ``is_complete``, the user interrupted the loads.
    """

    model: dict[str, Any]
    weights: str
    parameters: Whole
    dtype: str
    is_compiled: Flag
    device: str
    threads: Whole
    prompt_tokens: Whole
    new_tokens: Whole
    temperature: Figure
    requests: Whole | None
    seconds: Figure
    max_batch: Whole
    repeats: Whole
    seed: Whole
    against: list[str]
    servers: list[ServedBy]
    rows: list[ServingRow]
    engine_batch: EngineBatch | None
    over_one_client: dict[str, Spread]
    check: AnswerCheck | None
    soak: SoakFigures | None = None
    is_complete: Flag = True
    problems: list[str] = field(default_factory=list)

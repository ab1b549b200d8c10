"""Figures of serving runs: percentiles, throughput of whole completions, paired ratios."""

from __future__ import annotations

from pathlib import Path

import pytest

from psannlm.benchmarks.serving.exchange import Answer
from psannlm.benchmarks.serving.load import Level, LoadRun
from psannlm.benchmarks.serving.report import ServingReport, ServingSettings, gaps_s, new_tokens_of
from psannlm.benchmarks.serving.subject import Subject
from psannlm.config.model import ModelConfig
from psannlm.reports.schemas.serving import Percentiles


def answer(arrivals_s: list[float], n_tokens: int | None = None, failure: str = "") -> Answer:
    return Answer(200, "text", "length", n_tokens, arrivals_s, arrivals_s[-1], failure)


def test_percentiles_interpolate_and_keep_the_spread() -> None:
    found = Percentiles.of([[float(n) for n in range(101)], [2.0 * n for n in range(101)], []])
    assert found is not None
    assert (found.p50.lowest, found.p50.median, found.p50.highest) == (50.0, 75.0, 100.0)
    assert (found.p95.lowest, found.p99.highest) == (95.0, 198.0)
    assert Percentiles.of([[1.0, 2.0]]).p50.median == 1.5  # type: ignore[union-attr]
    assert Percentiles.of([[], []]) is None


def test_gaps_are_within_each_whole_completion() -> None:
    run = LoadRun({0: answer([1.0, 1.5, 3.0]), 1: answer([0.5, 0.75]), 2: answer([0.0, 9.0], failure="cut")}, 4.0)
    assert gaps_s(run) == [0.5, 1.5, 0.25]


def test_tokens_are_those_reported_or_asked_for() -> None:
    assert new_tokens_of(answer([1.0, 2.0], n_tokens=5), 8) == 5
    assert new_tokens_of(answer([1.0, 2.0]), 8) == 8
    assert new_tokens_of(Answer(200, "ab", "stop", None, [1.0, 2.0], 2.0), 8) == 2


def report(ours: list[LoadRun], theirs: list[LoadRun], one: list[LoadRun]) -> ServingReport:
    settings = ServingSettings(levels=(Level(1), Level(4)), new_tokens=8, max_batch=4)
    subject = Subject(Path("none"), ModelConfig(vocab_size=9), None, "random", 1)  # type: ignore[arg-type]
    runs = {("psannlm", Level(1)): one, ("psannlm", Level(4)): ours, ("other", Level(4)): theirs}
    return ServingReport(settings, subject, "cpu", 1, [], runs, engine_runs=[(100, 10.0), (100, 5.0)])


def test_ratios_pair_the_runs_of_a_round() -> None:
    def run(n_tokens: int, first_s: float = 1.0) -> LoadRun:
        return LoadRun({0: answer([first_s], n_tokens), 1: answer([1.0], 1000, failure="cut")}, 10.0)

    made = report([run(90, 2.0), run(220, 6.0)], [run(30, 4.0), run(110, 3.0)], [run(10), run(40)])
    assert made.throughputs("psannlm", Level(4)) == [9.0, 22.0]
    over = made.over_reference("other", Level(4))
    assert over is not None
    assert (over.lowest, over.highest) == (2.0, 3.0)
    batch = made.engine_batch()
    assert batch is not None
    assert batch.served_over_it is not None
    assert (batch.served_over_it.lowest, batch.served_over_it.highest) == (0.9, 1.1)
    clients = made.over_one_client()
    assert {name: (ratio.lowest, ratio.highest) for name, ratio in clients.items()} == {"4 clients": (5.5, 9.0)}
    first = made.metrics().rows[2].our_first_token_p95_over_its
    assert first is not None
    assert (first.lowest, first.highest) == (0.5, 2.0)


@pytest.mark.parametrize(("level", "expected"), [(Level(1), 8), (Level(16), 64), (Level(rate=2.0), 64)])
def test_default_requests_fill_every_client(level: Level, expected: int) -> None:
    assert ServingSettings(levels=(level,)).requests_at(level) == expected
    assert ServingSettings(levels=(level,), n_requests=3).requests_at(level) == 3

"""The benchmark on small servers: figures, failed requests, wrong answers, broken servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from psannlm.benchmarks.harness.interleaved import RunProgress
from psannlm.benchmarks.serving.bench import bench_serve
from psannlm.benchmarks.serving.load import Level
from psannlm.benchmarks.serving.own_engine import Asked, Expected
from psannlm.benchmarks.serving.report import ServingReport, ServingSettings
from psannlm.benchmarks.serving.servers import ServerSpec
from psannlm.benchmarks.serving.subject import Subject
from psannlm.config.model import ModelConfig
from psannlm.errors import ConfigError, WorkerError
from psannlm.reports.schemas.kinds import read_artifact_figures
from psannlm.reports.schemas.serving import ServingMetrics
from psannlm.reports.tables.serving import serving_headlines, serving_pictures, serving_tables
from psannlm.runtime.progress import Progress
from psannlm.tokenizers.base import Tokenizer

pytest.importorskip("h11")

Describe = Callable[..., ServerSpec]


class KnownEngine:
    """An engine that knows the right answers: what the small server sends when it is right."""

    def call(self, method: str, *arguments: Any) -> Any:
        if method == "threads":
            return 2
        asked: Sequence[Asked] = arguments[0]
        if method == "batch":
            return 4 * len(asked), 0.5
        return [Expected(f"{one.seed} one two three", "length", 4) for one in asked]


@contextmanager
def known_engine(*_: Any) -> Iterator[KnownEngine]:
    yield KnownEngine()


def small_subject(tokenizer: Tokenizer) -> Subject:
    config = ModelConfig(base="transformer", vocab_size=tokenizer.vocab_size)
    return Subject(Path("none"), config, tokenizer, "random", 1_000_000)


Bench = Callable[..., ServingReport]


@pytest.fixture
def bench(byte_tokenizer) -> Bench:  # type: ignore[no-untyped-def]
    def run(*specs: ServerSpec, **settings: Any) -> ServingReport:
        subject = small_subject(byte_tokenizer)
        given = {"levels": (Level(1), Level(2)), "max_batch": 2, "repeats": 2, "n_requests": 6, "new_tokens": 4}
        build: Callable[..., AbstractContextManager[KnownEngine]] = known_engine
        return bench_serve(subject, specs, ServingSettings(**{**given, **settings}), build_engine=build)

    return run


def test_report_of_right_server_has_no_problem(bench: Bench, small_server: Describe) -> None:
    report = bench(small_server("right"), small_server("right", "other"), n_checked=5)
    assert report.problems == []
    metrics = report.metrics()
    assert [(row.server, row.concurrency, row.requests, row.failed, row.new_tokens) for row in metrics.rows] == [
        ("psannlm", 1, 12, 0, 48),
        ("other", 1, 12, 0, 48),
        ("psannlm", 2, 12, 0, 48),
        ("other", 2, 12, 0, 48),
    ]
    for row in metrics.rows:
        assert row.tokens_per_s is not None
        assert row.first_token_s is not None
        assert row.between_tokens_s is not None
        assert row.first_token_s.p50.median <= row.first_token_s.p95.median <= row.first_token_s.p99.median
        assert (row.our_tokens_per_s_over_its is None) == (row.server == "psannlm")
    assert metrics.check is not None
    assert (metrics.check.compared, metrics.check.wrong) == (5, 0)
    assert metrics.engine_batch is not None
    assert metrics.engine_batch.tokens_per_s.median == 16.0
    assert [server.exit_code for server in metrics.servers] == [0, 0]


def test_written_figures_are_read_and_shown(bench: Bench, small_server: Describe) -> None:
    metrics = bench(small_server("right")).metrics()
    figures = metrics.as_dict()
    read = read_artifact_figures("serving", figures)
    assert isinstance(read, ServingMetrics)
    assert read == metrics
    assert [row[0] for row in serving_tables(read, figures)[0].rows] == ["psannlm, 1 client", "psannlm, 2 clients"]
    assert [picture.file for picture in serving_pictures(read, "x_")] == ["x_serving.png"]
    assert [headline.unit for headline in serving_headlines(read)] == ["tokens/s"]


def test_wrong_answers_are_counted_and_quoted(bench: Bench, small_server: Describe) -> None:
    report = bench(small_server("wrong"), n_checked=4)
    (problem,) = report.problems
    assert problem.startswith("4 of 4 answers differ from the engine's own")
    assert "'oo three' was served and 'wo three' is right" in problem


def test_failed_requests_are_counted_without_tokens(bench: Bench, small_server: Describe) -> None:
    report = bench(small_server("refuses"), levels=(Level(1),), repeats=1, n_checked=0)
    (row,) = report.metrics().rows
    assert (row.requests, row.failed, row.failures) == (6, 3, {"HTTP 429": 3})
    assert row.new_tokens == 12
    assert report.problems == ["1 client: requests failed: 3 x HTTP 429"]


def test_server_that_answers_nothing_has_no_figures(bench: Bench, small_server: Describe) -> None:
    report = bench(small_server("cuts"), levels=(Level(2),), repeats=1)
    (row,) = report.metrics().rows
    assert row.failures == {"connection closed before the end of the response": 6}
    assert (row.tokens_per_s, row.first_token_s, row.new_tokens, report.check) == (None, None, 0, None)


def test_failures_of_a_reference_server_are_no_problem(bench: Bench, small_server: Describe) -> None:
    report = bench(small_server("right"), small_server("cuts", "other"), levels=(Level(1),), repeats=1)
    assert report.problems == []
    ours, other = report.metrics().rows
    assert (ours.failed, other.failed, other.our_tokens_per_s_over_its) == (0, 6, None)


def test_server_that_does_not_start_is_reported(bench: Bench, small_server: Describe) -> None:
    with pytest.raises(WorkerError, match="exit code 5; it printed: there is no such model"):
        bench(small_server("dead"))


def test_server_that_dies_under_load_is_reported(bench: Bench, small_server: Describe) -> None:
    with pytest.raises(WorkerError, match="ended under load, with exit code 9"):
        bench(small_server("dies"))


def test_exit_code_after_sigterm_is_checked(bench: Bench, small_server: Describe) -> None:
    report = bench(small_server("rude"), levels=(Level(1),), repeats=1)
    assert report.problems == ["our server ended with exit code 7 after SIGTERM"]


def test_int8_with_reference_servers_is_refused() -> None:
    with pytest.raises(ConfigError, match="int8"):
        ServingSettings(levels=(Level(1),), dtype="int8", against=("transformers",))


def test_interrupted_loads_keep_their_figures(small_server: Describe, byte_tokenizer) -> None:  # type: ignore[no-untyped-def]
    settings = ServingSettings(levels=(Level(1), Level(2)), max_batch=2, repeats=2, n_requests=6, new_tokens=4)
    kept: list[ServingReport] = []

    def stop(progress: Progress) -> None:
        if isinstance(progress, RunProgress) and progress.run == 4:
            raise KeyboardInterrupt

    subject, spec = small_subject(byte_tokenizer), small_server("right")
    with pytest.raises(KeyboardInterrupt):
        bench_serve(subject, [spec], settings, build_engine=known_engine, on_progress=stop, on_interrupt=kept.append)
    (report,) = kept
    metrics = report.metrics()
    assert not metrics.is_complete
    assert [(row.concurrency, row.runs, row.new_tokens) for row in metrics.rows] == [(1, 1, 24), (2, 1, 24)]
    assert len(report.engine_runs) == 1
    assert read_artifact_figures("serving", metrics.as_dict()) == metrics

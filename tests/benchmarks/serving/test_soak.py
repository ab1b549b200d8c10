"""The soak on small servers: lost requests, wrong answers, rubbish that is accepted and memory that grows."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from psannlm.benchmarks.serving.bench import soak_server
from psannlm.benchmarks.serving.load import Level
from psannlm.benchmarks.serving.report import ServingReport, ServingSettings, soak_problems
from psannlm.benchmarks.serving.servers import ServerSpec
from psannlm.benchmarks.serving.soak import Soaked, draws, pick_kind
from psannlm.reports.schemas.kinds import read_artifact_figures
from psannlm.reports.tables.serving import serving_tables
from tests.benchmarks.serving.test_bench import known_engine, small_subject

pytest.importorskip("h11")

Soak = Callable[[str], ServingReport]


@pytest.fixture
def soaked(byte_tokenizer, small_server: Callable[..., ServerSpec]) -> Soak:  # type: ignore[no-untyped-def]
    def run(kind: str) -> ServingReport:
        settings = ServingSettings(
            levels=(Level(8),), n_requests=80, new_tokens=4, prompt_tokens=8, n_checked=20, timeout_s=3.0
        )
        return soak_server(small_subject(byte_tokenizer), small_server(kind), settings, build_engine=known_engine)

    return run


def test_soak_loses_no_request_of_right_server(soaked: Soak) -> None:
    report = soaked("right")
    figures = report.metrics().soak
    assert figures is not None
    assert (figures.requests, figures.lost, figures.lost_for) == (80, 0, {})
    assert figures.answered == sum(figures.kinds[kind] for kind in ("streamed", "whole", "stalled"))
    assert report.check is not None
    assert (report.check.compared, report.check.wrong) == (20, 0)
    metrics = report.metrics()
    assert read_artifact_figures("serving", metrics.as_dict()) == metrics
    (note,) = serving_tables(metrics, metrics.as_dict())[0].rows[0]
    assert "Soak of 80 requests at concurrency 8: 0 lost" in note
    # The small server takes whatever it is sent.
    assert figures.unrefused > 0
    assert [problem.partition(": ")[0] for problem in report.problems] == [
        f"{figures.unrefused} requests of rubbish not refused"
    ]


def test_soak_counts_lost_and_wrong_answers(soaked: Soak) -> None:
    cut = soaked("cuts").metrics()
    assert cut.soak is not None
    assert cut.soak.lost == sum(cut.soak.kinds[kind] for kind in ("streamed", "whole", "stalled"))
    assert any("requests lost" in problem for problem in cut.problems)
    wrong = soaked("wrong")
    assert wrong.check is not None
    assert wrong.check.wrong == 20


@pytest.mark.parametrize(("last", "is_flat"), [(104, True), (106, False)])
def test_soak_limits_the_growth_of_memory(last: int, is_flat: bool) -> None:
    # What the first requests take is not growth.
    resident = [50, 60, 100, 100, 101, 102, 103, 103, last, last]
    figures = Soaked(resident=resident).figures(4)
    assert figures.memory_growth == pytest.approx(last / 100 - 1)
    assert (soak_problems(figures) == []) == is_flat


def test_soak_kinds_follow_the_seed() -> None:
    kinds: list[Any] = [pick_kind(draws(1, number)) for number in range(2000)]
    assert kinds == [pick_kind(draws(1, number)) for number in range(2000)]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    assert set(counts) == {"streamed", "whole", "stalled", "vanished", "rubbish"}
    assert min(counts.values()) > 100
    assert isinstance(draws(1, 2), random.Random)

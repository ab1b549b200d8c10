"""GPU-07 and GPU-09: detection of wrong caches, slow decoding and diverging compiled passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from psannlm.generation.engine import Engine
from psannlm.gpu_suite.checks import generation
from psannlm.gpu_suite.checks.generation import (
    check_compiled,
    check_generation,
    compiled_decoding_measures,
    compiled_training_measures,
    graph_measures,
    rate_measures,
    token_measures,
)
from psannlm.gpu_suite.context import CheckContext


@pytest.fixture
def one_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "BASE_NAMES", ("waveresnet",))


@pytest.mark.slow
def test_generation_check_cache_matches_full_passes(context: CheckContext) -> None:
    result = check_generation(context)
    assert result.status == "ok", result.problems()


@pytest.mark.usefixtures("one_base")
def test_generation_check_detects_wrong_cache_row(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Engine.prefill

    def mixed_up(self: Engine, prompts: Any, max_new_tokens: int) -> Any:
        logits, state = original(self, prompts, max_new_tokens)
        state.layers[0].values = state.layers[0].values.roll(1, dims=0)
        return logits, state

    names = [measure.name for measure in check_generation(context).measures]
    monkeypatch.setattr(Engine, "prefill", mixed_up)
    result = check_generation(context)
    assert [measure.name for measure in result.measures] == names, "a name depends on nothing that was measured"
    missed = {measure.name: measure.detail for measure in result.missed}
    assert missed["waveresnet: tokens that the cache changes"].startswith("outputs differ first at row")
    assert missed["waveresnet: rows that the batch changes"].startswith("rows [")


@pytest.mark.usefixtures("one_base")
def test_slow_decoding_fails_at_full_size_only(context: CheckContext) -> None:
    report, _ = generation._one_row(context, "waveresnet")
    slow = rate_measures("b", report, is_compiled=False, is_dry_run=False)
    assert [measure.is_met for measure in slow] == [False, False], "a row of a tiny model reads next to nothing"
    assert all(measure.is_met for measure in rate_measures("b", report, is_compiled=False, is_dry_run=True))


def test_generation_check_detects_repeated_id_and_cache_size(context: CheckContext) -> None:
    report = generation._bench(context, "waveresnet", batch_size=2, cases="batch")
    assert all(measure.is_met for measure in token_measures("b", report))

    def missed(**changes: Any) -> list[tuple[str, float]]:
        runs = {case: [replace(run, **changes) for run in made] for case, made in report.runs.items()}
        return [(m.name, m.value) for m in token_measures("b", replace(report, runs=runs)) if not m.is_met]

    assert missed(ids=[[7] * 8] * 2) == [("b: different tokens", 1)]
    [size] = {run.cache_bytes for made in report.runs.values() for run in made} - {0}
    for off in (1, -1):
        assert missed(cache_bytes=size + off) == [("b: size of the cache beside its prediction", 1)]


class Report:
    """The part of a ``KvReport`` that GPU-09 reads."""

    def __init__(self, gain: float | None, seconds: float, difference: Any = None) -> None:
        self.agreement = type("Agreement", (), {"difference": difference})()
        self._gain, self._seconds = gain, seconds

    def from_compiling(self, is_batched: bool) -> Any:
        return None if self._gain is None else generation.Spread.of([self._gain])

    def compile_s(self) -> dict[str, float]:
        return {"one": self._seconds}


@pytest.mark.parametrize(
    ("report", "missed"),
    [
        (Report(2.0, 20.0), []),
        (Report(0.9, 20.0), ["b: decode rate, compiled / plain"]),
        (Report(None, 20.0), ["b: decode rate, compiled / plain"]),
        (Report(2.0, 400.0), ["b: warm-up of decoding"]),
        (Report(2.0, 20.0, "row 1"), ["b: tokens that compiling changes"]),
    ],
    ids=["good", "slower", "not compiled", "long warm-up", "another token"],
)
def test_compiled_decoding_limits(report: Any, missed: list[str]) -> None:
    measures = compiled_decoding_measures("b", report, is_dry_run=False)
    assert [m.name for m in measures if not m.is_met] == missed
    assert measures[0].detail == (report.agreement.difference or "")


def test_graph_measures_detect_missing_cuda_graphs() -> None:
    assert [m.is_met for m in graph_measures("b", 0, 3)] == [True, True]
    assert [m.is_met for m in graph_measures("b", 1, 3)] == [False, True]
    assert [m.is_met for m in graph_measures("b", 0, 0)] == [True, False]


def test_compiled_training_limits() -> None:
    def missed(compiled: list[float], gain: float, seconds: float) -> list[str]:
        measures = compiled_training_measures("b", [2.0, 1.0], compiled, gain, seconds, is_dry_run=False)
        return [m.name for m in measures if not m.is_met]

    assert missed([2.0, 1.0], 1.5, 30.0) == []
    assert missed([2.0, 1.01], 0.5, 1000.0) == [
        "b: loss, compiled against plain",
        "b: training rate, compiled / plain",
        "b: warm-up of training",
    ]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_compiled_training_detects_non_finite_loss(place: int) -> None:
    losses = [3.0, 2.0, 1.0]
    losses[place] = float("nan")
    measures = compiled_training_measures("b", [3.0, 2.0, 1.0], losses, 1.5, 30.0, is_dry_run=True)
    assert [m.name for m in measures if not m.is_met] == ["b: loss, compiled against plain"]


def test_compile_check_skips_without_compiler(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psannlm.kernels.compiler.shutil.which", lambda name: None)
    assert check_compiled(context).skipped == "torch.compile needs a C++ compiler (install g++)"
    monkeypatch.setattr("psannlm.kernels.compiler.find_spec", lambda name: None)
    skipped = check_compiled(replace(context, device=torch.device("cuda"))).skipped
    assert skipped == "torch.compile needs Triton (pip install triton)"

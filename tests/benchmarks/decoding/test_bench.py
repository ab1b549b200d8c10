"""Decoding benchmark: no problem with a correct cache, and detection of wrong tokens and cache sizes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from psannlm.benchmarks.decoding import bench, modes
from psannlm.benchmarks.decoding.bench import bench_kv, build_random_model
from psannlm.benchmarks.decoding.modes import CASES, Case, DecodeRun, Prompts
from psannlm.benchmarks.decoding.report import KvReport, KvSettings
from psannlm.benchmarks.harness.interleaved import RunProgress
from psannlm.benchmarks.harness.reference_task import ReferenceTask
from psannlm.config.model import ModelConfig
from psannlm.errors import ConfigError, GenerationError

CPU = torch.device("cpu")
TINY = ModelConfig(d_model=16, n_layers=2, n_heads=2, d_mlp=16, vocab_size=50)
SETTINGS = KvSettings(batch_size=2, prompt_length=4, max_new_tokens=5, repeats=2, contexts=())


@pytest.fixture(autouse=True)
def collect_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip garbage collection between runs, which takes longer than runs of this size."""
    monkeypatch.setattr("gc.collect", lambda *generation: 0)


def measure(settings: KvSettings, config: ModelConfig = TINY, **named: Any) -> KvReport:
    return bench_kv(build_random_model(config, settings, CPU), settings, **named)


@pytest.mark.parametrize("base", ["respsann", "waveresnet", "transformer"])
def test_bench_kv_reports_no_problem_for_correct_cache(base: str) -> None:
    events: list[RunProgress] = []
    report = measure(SETTINGS, TINY.model_copy(update={"base": base}), on_progress=events.append)
    assert report.problems == []
    assert {case: len(runs) for case, runs in report.runs.items()} == dict.fromkeys(CASES, 2)
    assert all([len(row) for row in run.ids] == [5, 5] for runs in report.runs.values() for run in runs)
    assert report.model.max_seq_len == 9
    batch, row = Case(True, True), Case(True, False)
    measured = report.measured_cache_bytes()
    assert measured == report.predicted_cache_bytes()
    assert measured[batch] == 2 * measured[row]
    # Four cases and two ways to read, once to warm up and twice to count.
    assert events[-1].run == events[-1].n_runs == 6 * (1 + 2)
    # Two runs of each case and the one before the rounds, 10 tokens each.
    assert report.agreement.n_checked == 10 * (4 * 2 + 1)
    plain = report.metrics().as_dict()
    assert plain["outputs_are_equal"]
    assert len(plain["cases"]) == 4
    assert plain["packing_cost"] is plain["rival"] is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_bench_kv_packed_weights_agree_in_all_cases(dtype: str) -> None:
    report = measure(replace(SETTINGS, dtype=dtype, max_new_tokens=12))
    assert report.problems == []
    assert report.agreement.largest_tie <= report.agreement.largest_tolerance
    assert report.cache_element_bytes == 2
    assert report.packing is not None
    assert report.packing.n_tokens == 16 * 256
    assert 0.9 < report.packing.ratio < 1.1


def test_bench_kv_uncached_steps_and_cases_are_honoured() -> None:
    report = measure(replace(SETTINGS, max_new_tokens=20, uncached_steps=3, cases="batch"))
    assert report.problems == []
    assert list(report.runs) == [Case(True, True), Case(False, True)]
    assert report.n_uncached_passes == 4
    assert [case["passes_timed"] for case in report.metrics().as_dict()["cases"]] == [20, 4]
    assert report.agreement.n_checked == 2 * (3 * 20 + 2 * 4)


@pytest.mark.slow
def test_bench_kv_time_left_stays_within_the_limit() -> None:
    ticks = itertools.count()
    limit_s = 10_000.0
    events: list[tuple[float, RunProgress]] = []
    now = 0.0

    def clock() -> float:
        nonlocal now
        now = float(next(ticks))
        return now

    settings = replace(SETTINGS, repeats=20, contexts=(16, 32), dtype="bfloat16", time_limit_s=limit_s)
    measure(settings, clock=clock, on_progress=lambda event: events.append((now, event)))
    shown = [(now, event.left_s) for now, event in events if event.left_s is not None]
    assert len(shown) > 50
    assert all(left_s <= limit_s - now for now, left_s in shown)


@pytest.mark.slow
def test_bench_kv_leaves_out_contexts_beyond_the_model() -> None:
    settings = replace(SETTINGS, contexts=(40, 64))
    model = build_random_model(TINY, settings, CPU)
    assert model.config.max_seq_len == 64 + 32
    report = bench_kv(model, replace(settings, contexts=(40, 64, 65)))
    assert [point.context for point in report.growth] == [40, 64]
    assert report.left_out == report.metrics().as_dict()["contexts_left_out"] == [65]


def test_bench_kv_too_short_context_raises_early() -> None:
    model = build_random_model(TINY, SETTINGS, CPU)
    with pytest.raises(ConfigError, match="context of 9; lower --prompt-length"):
        bench_kv(model, replace(SETTINGS, prompt_length=5))
    endless = TINY.model_copy(update={"positional_encoding": "alibi"})
    report = bench_kv(build_random_model(endless, SETTINGS, CPU), replace(SETTINGS, prompt_length=20))
    assert report.problems == []


def test_bench_kv_unknown_dtype_raises() -> None:
    with pytest.raises(GenerationError, match="int4"):
        measure(replace(SETTINGS, dtype="int4"))


@pytest.mark.slow
def test_bench_kv_seed_determines_prompts_and_weights() -> None:
    outputs = [measure(replace(SETTINGS, seed=seed, repeats=1)).runs[CASES[0]][0].ids for seed in (1, 1, 2)]
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize("base", ["respsann", "waveresnet", "transformer"])
def test_random_model_output_depends_on_every_parameter(base: str) -> None:
    """A branch or a bias at zero would let a broken cache pass: halving any parameter must change the logits."""
    model = build_random_model(TINY.model_copy(update={"base": base}), replace(SETTINGS, seed=7), CPU)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = model.logits(model.hidden_states(ids))
        for name, parameter in model.named_parameters():
            kept = parameter.clone()
            parameter.mul_(0.5)
            change = (model.logits(model.hidden_states(ids)) - before).abs().max()
            parameter.copy_(kept)
            assert change > 1e-4, name


def corrupt(monkeypatch: pytest.MonkeyPatch, name: str, place: int, batch_size: int) -> None:
    """Make one way of decoding so many rows at once return another token at one place of its last row."""
    real = getattr(modes, name)

    def wrong(*arguments: object) -> DecodeRun:
        run: DecodeRun = real(*arguments)
        if len(run.ids) == batch_size:
            run.ids[-1][place] = (run.ids[-1][place] + 1) % 50
        return run

    monkeypatch.setattr(modes, name, wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "batch_size", "names"),
    [
        ("_decode", 2, {"cache on, batch", "one full forward pass"}),
        ("_decode", 1, {"cache on, batch", "cache on, row by row"}),
        ("_decode_uncached", 2, {"cache on, batch", "cache off, batch"}),
        ("_decode_uncached", 1, {"cache on, batch", "cache off, row by row"}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bench_kv_reports_a_wrong_token(
    way: str, batch_size: int, names: set[str], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt(monkeypatch, way, 3, batch_size)
    report = measure(replace(SETTINGS, dtype=dtype, seed=3))
    found = report.agreement.difference
    assert found is not None
    assert found.place == 3
    assert {found.first, found.second} == names
    assert abs(found.first_token - found.second_token) in (1, 49)
    assert found.gap > found.tolerance
    (problem,) = report.problems
    assert f"row {found.row}, new token 3" in problem
    assert str(found.first_token) in problem
    assert not report.metrics().as_dict()["outputs_are_equal"]


def test_bench_kv_reports_wrong_cache_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psannlm.benchmarks.decoding.report.cache_bytes", lambda *arguments: 12)
    problems = measure(replace(SETTINGS, repeats=1)).problems
    assert len(problems) == 2
    assert "predicts 12" in problems[0]


class FakeReferenceModel:
    """Decodes at once, and remembers what it was asked."""

    name, description, parameters = "fake", "a fake of 7 parameters", 7

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.now = 0.0

    def generate(self, prompts: Prompts, max_new_tokens: int) -> Prompts:
        self.asked.append((len(prompts), max_new_tokens))
        # The clock of the run is the real one, and a busy machine keeps a process waiting for some milliseconds.
        time.sleep(0.03 * max_new_tokens)
        return [[0] * max_new_tokens for _ in prompts]


def test_bench_kv_interleaves_the_reference_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psannlm.benchmarks.decoding.report.require_reference_model", lambda name: None)
    reference_model = FakeReferenceModel()
    built: list[tuple[Any, ...]] = []

    def make(*arguments: Any) -> FakeReferenceModel:
        built.append(arguments)
        return reference_model

    order: list[str] = []
    report = measure(
        replace(SETTINGS, against=("fake",), cases="batch"),
        make_reference=make,
        on_progress=lambda progress: None if order[-1:] == [progress.candidate] else order.append(progress.candidate),
    )
    assert built == [("fake", ReferenceTask(report.model, report.parameters, 2, 9, "float32", CPU))]
    # Its first call, a warm-up and two counted runs; each of them for one token and for all.
    assert reference_model.asked == [(2, 1), (2, 5)] * 4
    assert order == [
        "first run, cache on, batch",
        "first run, fake",
        *["cache on, batch", "cache off, batch", "fake", "reading memory, batch"] * 3,
    ]
    [runs] = report.reference_models
    assert runs.parameters == 7
    assert len(runs.runs) == 2
    assert runs.first_s > 0
    assert set(report.over_reference_model(runs)) == {"whole", "decode"}
    # What a reference model of other weights writes is not compared.
    assert report.problems == []


@pytest.fixture
def eager_compile(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """An engine that says it compiles and does not, so that the runs of both can be seen without a compiler."""
    made: list[bool] = []
    engine: Callable[..., Any] = bench.Engine

    def build(model: Any, *, dtype: str = "float32", compile: bool = False) -> Any:
        made.append(compile)
        built = engine(model, dtype=dtype)
        if compile:
            built.compiles, built.forward_tokens = True, engine(model, dtype=dtype).forward_tokens
        return built

    monkeypatch.setattr(bench, "Engine", build)
    return made


@pytest.mark.slow
def test_bench_kv_measures_compiled_beside_plain_engine(eager_compile: list[bool]) -> None:
    report = measure(replace(SETTINGS, is_compiled=True))
    assert eager_compile == [False, True]
    twins = [Case(True, True, True), Case(True, False, True)]
    assert list(report.runs) == [*CASES, *twins]
    assert report.problems == []
    assert list(report.first_s) == list(report.compile_s()) == twins
    assert report.from_compiling(True) is not None
    assert report.ours == twins[0]


def test_bench_kv_without_compiler_measures_plain_only(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Callable[..., Any] = bench.Engine

    def build(model: Any, *, dtype: str = "float32", compile: bool = False) -> Any:
        built = engine(model, dtype=dtype)
        built.notices = ["no compiler"] if compile else []
        return built

    monkeypatch.setattr(bench, "Engine", build)
    report = measure(replace(SETTINGS, is_compiled=True))
    assert list(report.runs) == list(CASES)
    assert report.notices == ["no compiler"]

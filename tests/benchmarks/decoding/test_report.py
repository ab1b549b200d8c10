"""Results of the decoding benchmark: speedups, rooflines, cache sizes and settings."""

from __future__ import annotations

import pytest

from psannlm.benchmarks.decoding.modes import CASES, Case, DecodeRun
from psannlm.benchmarks.decoding.report import KvReport, KvSettings
from psannlm.benchmarks.harness.reference_models import ReferenceRuns
from psannlm.config.model import ModelConfig
from psannlm.errors import ConfigError
from psannlm.models.accounting import cache_bytes
from psannlm.models.registry import resolve
from psannlm.reports.schemas.decoding import Agreement
from psannlm.reports.schemas.measured import Spread

TINY = resolve(ModelConfig(d_model=16, n_layers=2, n_heads=2, d_mlp=16, vocab_size=50, max_seq_len=32))
SETTINGS = KvSettings(batch_size=2, prompt_length=4, max_new_tokens=11, repeats=3, contexts=())
COMPILED = Case(True, True, True)


def run_at(rate: float, n_rows: int = 2) -> DecodeRun:
    """A run that decoded 10 tokens of each row after the first at this rate, after a second of prefill."""
    seconds = n_rows * 10 / rate
    rows = [list(range(11))] * n_rows
    slots = 16
    n_bytes = cache_bytes(TINY, 2, slots)
    return DecodeRun(rows, 11, 1.0, 1.0, seconds, 1.0 + seconds, cache_bytes=n_bytes, cache_slots=slots)


def report_of(rates: dict[Case, list[float]], **changes: object) -> KvReport:
    runs = {case: [run_at(rate) for rate in values] for case, values in rates.items()}
    fields = {
        "settings": SETTINGS,
        "model": TINY,
        "weights": "random",
        "device": "cpu",
        "threads": 1,
        "parameters": 1,
        "weight_bytes": 1,
        "cache_element_bytes": 4,
        "runs": runs,
        "agreement": Agreement(None, 0, 0.0, 0.0, 1),
        "n_bytes": {True: 100, False: 50},
        "reads": {True: [1000.0] * 3, False: [1000.0] * 3},
        **changes,
    }
    return KvReport(**fields)  # type: ignore[arg-type]


FOUR = {
    Case(True, True): [800.0, 400.0, 800.0],
    Case(True, False): [200.0, 100.0, 200.0],
    Case(False, True): [20.0, 10.0, 40.0],
    Case(False, False): [10.0, 5.0, 10.0],
}


def test_speedups_change_one_factor_at_a_time() -> None:
    report = report_of({**FOUR, COMPILED: [1600.0, 1600.0, 1600.0], Case(True, False, True): [100.0, 100.0, 100.0]})
    # The compiled engine is faster still, and has no part in what the cache is worth.
    assert report.from_cache(is_batched=True) == Spread(pytest.approx(40), pytest.approx(20), pytest.approx(40))
    assert report.from_cache(is_batched=False) == Spread(pytest.approx(20), pytest.approx(20), pytest.approx(20))
    assert report.from_batching(use_cache=True) == Spread(pytest.approx(4), pytest.approx(4), pytest.approx(4))
    assert report.from_batching(use_cache=False) == Spread(pytest.approx(2), pytest.approx(2), pytest.approx(4))
    assert report.from_batching(True, is_compiled=True) == Spread(*[pytest.approx(16)] * 3)
    assert report.from_compiling(is_batched=True) == Spread(pytest.approx(2), pytest.approx(2), pytest.approx(4))
    assert report.from_compiling(is_batched=False) == Spread(*map(pytest.approx, (0.5, 0.5, 1.0)))
    assert report.throughput(Case(True, True)) == Spread(*map(pytest.approx, (800, 400, 800)))
    plain = report.metrics().as_dict()["speedup_of_decoding"]
    assert plain["cache_alone_one_row"]["median"] == pytest.approx(20)
    assert plain["compiling_alone_in_batch"]["median"] == pytest.approx(2)


def test_speedup_of_missing_case_is_none() -> None:
    report = report_of({Case(True, True): [800.0]}, reads={True: [1000.0]}, n_bytes={True: 100})
    assert report.from_cache(True) is report.from_batching(True) is report.from_compiling(True) is None
    assert report.metrics().as_dict()["speedup_of_decoding"] == {}
    assert report.n_uncached_passes == 0


def test_reference_model_is_paired_with_fastest_engine() -> None:
    theirs = [run_at(rate) for rate in (200.0, 100.0, 200.0)]
    reference_model = ReferenceRuns("fake", "a fake", 7, 12.5, theirs)
    plain = report_of(FOUR, reference_models=[reference_model])
    assert plain.ours == Case(True, True)
    assert plain.over_reference_model(reference_model)["decode"] == Spread(*[pytest.approx(4)] * 3)
    # A second of prefill on both sides: 20 tokens at 800 and at 200 a second.
    assert plain.over_reference_model(reference_model)["whole"] == Spread(
        *map(pytest.approx, (1.1 / 1.025, 1.1 / 1.025, 1.2 / 1.05))
    )
    compiled = report_of({**FOUR, COMPILED: [1600.0] * 3}, reference_models=[reference_model])
    assert compiled.ours == COMPILED
    assert compiled.over_reference_model(reference_model)["decode"].median == pytest.approx(8)
    figures = compiled.metrics().as_dict()["reference_model"]
    assert compiled.metrics().as_dict()["rival"] == figures
    assert compiled.metrics().as_dict()["reference_models"] == [figures]
    assert figures["our_rate_over_its"]["decode"]["median"] == pytest.approx(8)
    assert (figures["parameters"], figures["first_s"]) == (7, 12.5)


def test_rooflines_use_each_cases_own_bytes() -> None:
    rooflines = report_of(FOUR).rooflines()
    assert set(rooflines) == {Case(True, True), Case(True, False)}
    # 2 rows at 800 tokens a second are 400 steps a second; row by row each token is a step.
    assert rooflines[Case(True, True)].step_s.lowest == pytest.approx(1 / 400)
    assert rooflines[Case(True, False)].step_s.lowest == pytest.approx(1 / 200)
    assert rooflines[Case(True, True)].fraction.median == pytest.approx(100 / 1000 * 400)
    assert rooflines[Case(True, False)].fraction.median == pytest.approx(50 / 1000 * 200)


def test_compile_s_is_first_run_minus_median() -> None:
    report = report_of({**FOUR, COMPILED: [20.0] * 3}, first_s={COMPILED: 9.0})
    assert report.compile_s() == {COMPILED: pytest.approx(9.0 - 2.0)}


def test_problems_name_wrong_or_small_caches() -> None:
    rates = {Case(True, True): [800.0]}
    assert report_of(rates).problems == []
    [problem] = report_of(rates, cache_element_bytes=2).problems
    assert f"predicts {cache_bytes(TINY, 2, 16, 2):,}" in problem
    [problem] = report_of(rates, settings=KvSettings(batch_size=2, prompt_length=6, max_new_tokens=12)).problems
    assert "holds 16 tokens per row, and 17 are needed" in problem


@pytest.mark.parametrize(
    ("cases", "batch_size", "expected"),
    [
        ("all", 2, CASES),
        ("batch", 2, (Case(True, True), Case(False, True))),
        ("cached", 2, (Case(True, True), Case(True, False))),
        # One prompt is a batch and a row at once.
        ("all", 1, (Case(True, True), Case(False, True))),
        ("cached", 1, (Case(True, True),)),
    ],
)
def test_kv_settings_choose_cases(cases: str, batch_size: int, expected: tuple[Case, ...]) -> None:
    settings = KvSettings(batch_size=batch_size, cases=cases)  # type: ignore[arg-type]
    assert settings.chosen_cases(is_compiled=False) == expected
    twins = tuple(Case(True, case.is_batched, True) for case in expected if case.use_cache)
    assert settings.chosen_cases(is_compiled=True) == expected + twins


@pytest.mark.parametrize("name", ["batch_size", "prompt_length", "repeats"])
def test_kv_settings_refuse_too_small_sizes(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} 0 is too small; use 1 or more"):
        KvSettings(**{name: 0})


def test_kv_settings_refuse_unknown_values(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="max_new_tokens 1 is too small; use 2"):
        KvSettings(max_new_tokens=1)
    with pytest.raises(ConfigError, match="uncached_steps 1 is too small; use 2"):
        KvSettings(uncached_steps=1)
    with pytest.raises(ConfigError, match="did you mean 'cached'"):
        KvSettings(cases="cache")  # type: ignore[arg-type]
    monkeypatch.setattr("psannlm.benchmarks.harness.reference_models.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package transformers"):
        KvSettings(against=("transformers",))


def test_mean_context_is_mean_over_steps() -> None:
    settings = KvSettings(prompt_length=10, max_new_tokens=5)
    assert settings.mean_context == sum((11, 12, 13, 14)) // 4

"""The 2 x 2 is compared along one side at a time, and a wrong token or byte anywhere is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from psannlm.benchmarks import decoding, kv_cache
from psannlm.benchmarks.decoding import CASES, Case, DecodeRun
from psannlm.benchmarks.kv_cache import KvReport, KvSettings, bench_kv, build_random_model
from psannlm.benchmarks.timing import Spread, Standing
from psannlm.config.model import ModelConfig
from psannlm.errors import ConfigError
from psannlm.models.registry import resolve

CPU = torch.device("cpu")
TINY = ModelConfig(d_model=16, n_layers=2, n_heads=2, d_mlp=16, vocab_size=50)
SETTINGS = KvSettings(batch_size=2, prompt_length=4, max_new_tokens=5, repeats=2)


@pytest.mark.parametrize("base", ["respsann", "waveresnet", "transformer"])
def test_an_honest_run_has_no_problem(base: str) -> None:
    standings: list[Standing] = []
    config = TINY.model_copy(update={"base": base})
    report = bench_kv(config, SETTINGS, device=CPU, on_standing=standings.append)
    assert report.problems == []
    assert report.difference is None
    assert {case: len(runs) for case, runs in report.runs.items()} == dict.fromkeys(CASES, 2)
    assert all([len(row) for row in run.ids] == [5, 5] for runs in report.runs.values() for run in runs)
    assert report.model.max_seq_len == 9
    batch, row = Case(True, True), Case(True, False)
    assert report.measured_cache_bytes == report.predicted_cache_bytes
    assert report.measured_cache_bytes[batch] == 2 * report.measured_cache_bytes[row]
    assert standings[-1].run == standings[-1].n_runs == 4 * (1 + 2)
    plain = report.as_dict()
    assert plain["outputs_are_equal"]
    assert len(plain["cases"]) == 4


def test_the_seed_decides_prompts_and_weights() -> None:
    outputs = [
        bench_kv(TINY, replace(SETTINGS, seed=seed, repeats=1), device=CPU).runs[CASES[0]][0].ids for seed in (1, 1, 2)
    ]
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize("base", ["respsann", "waveresnet", "transformer"])
def test_every_part_of_the_random_model_shows(base: str) -> None:
    """A branch or a bias at zero would let a broken cache pass: halving any parameter must change the logits."""
    model = build_random_model(resolve(TINY.model_copy(update={"base": base, "max_seq_len": 9})), 7, CPU)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = model.logits(model.hidden_states(ids))
        for name, parameter in model.named_parameters():
            kept = parameter.clone()
            parameter.mul_(0.5)
            change = (model.logits(model.hidden_states(ids)) - before).abs().max()
            parameter.copy_(kept)
            assert change > 1e-4, name


def corrupt(monkeypatch: pytest.MonkeyPatch, name: str, row: int, place: int) -> None:
    """Make one way of decoding return another token at one place."""
    real = getattr(decoding, name)

    def wrong(*arguments: object) -> DecodeRun:
        run: DecodeRun = real(*arguments)
        if row < len(run.ids):
            run.ids[row][place] = (run.ids[row][place] + 1) % 50
        return run

    monkeypatch.setattr(decoding, name, wrong)


def test_a_wrong_token_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # Row 1 exists in a batch only, so one case of four is wrong.
    corrupt(monkeypatch, "decode_cached", row=1, place=3)
    report = bench_kv(TINY, SETTINGS, device=CPU)
    found = report.difference
    assert found is not None
    assert (found.row, found.place) == (1, 3)
    assert {found.first, found.second} >= {"cache on, batch"}
    assert abs(found.first_token - found.second_token) in (1, 49)
    assert found.gap > 1e-5
    (problem,) = report.problems
    assert "row 1, new token 3" in problem
    assert str(found.first_token) in problem
    assert not report.as_dict()["outputs_are_equal"]


def test_the_earliest_difference_is_named() -> None:
    model = build_random_model(resolve(TINY.model_copy(update={"max_seq_len": 9})), 7, CPU)

    def run(*ids: list[int]) -> DecodeRun:
        return DecodeRun(list(ids), 1.0, 1.0, 1.0, 1.0, 0)

    same = run([1, 2, 3], [4, 5, 6])
    runs = {CASES[0]: [same, same], CASES[1]: [run([1, 2, 9], [4, 5, 6])], CASES[2]: [run([1, 2, 3], [4, 8, 6])]}
    found = kv_cache.first_difference(model, [[1, 1], [2, 2]], runs)
    assert found is not None
    assert (found.row, found.place, {found.first_token, found.second_token}) == (1, 1, {5, 8})
    assert kv_cache.first_difference(model, [[1, 1], [2, 2]], {CASES[0]: [same, same], CASES[3]: [same]}) is None


def test_runs_of_one_case_are_compared_too() -> None:
    model = build_random_model(resolve(TINY.model_copy(update={"max_seq_len": 9})), 7, CPU)
    once, again = (DecodeRun([[1, token]], 1.0, 1.0, 1.0, 1.0, 0) for token in (2, 3))
    assert kv_cache.first_difference(model, [[1]], {CASES[0]: [once, again]}) is not None


def test_another_cache_size_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "cache_bytes", lambda *arguments: 12)
    problems = bench_kv(TINY, replace(SETTINGS, repeats=1), device=CPU).problems
    assert len(problems) == 2
    assert "predicts 12" in problems[0]


def report_of(rates: dict[Case, list[float]]) -> KvReport:
    """A report in which each run decoded 10 tokens after the first at these rates."""
    runs = {
        case: [DecodeRun([list(range(11))], 1.0, 1.0, 10 / rate, 1.0, 0) for rate in values]
        for case, values in rates.items()
    }
    predicted = {case: 0 for case in CASES if case.use_cache}
    return KvReport(SETTINGS, TINY, "cpu", 1, runs, None, predicted)


def test_speedups_change_one_thing_at_a_time() -> None:
    report = report_of(
        {
            Case(True, True): [800.0, 400.0, 800.0],
            Case(True, False): [200.0, 100.0, 200.0],
            Case(False, True): [20.0, 10.0, 40.0],
            Case(False, False): [10.0, 5.0, 10.0],
        }
    )
    assert report.from_cache(is_batched=True).median == pytest.approx(40)
    assert report.from_cache(is_batched=True).lowest == pytest.approx(20)
    assert report.from_cache(is_batched=False).median == pytest.approx(20)
    assert report.from_batching(use_cache=True).median == pytest.approx(4)
    assert report.from_batching(use_cache=False).median == pytest.approx(2)
    assert report.from_batching(use_cache=False).highest == pytest.approx(4)
    assert report.rate(Case(True, True)) == Spread(pytest.approx(800), pytest.approx(400), pytest.approx(800))
    plain = report.as_dict()["speedup_of_decoding"]
    assert plain["cache_alone_one_row"]["median"] == pytest.approx(20)
    assert plain["batching_alone_with_cache"]["median"] == pytest.approx(4)


@pytest.mark.parametrize("name", ["batch_size", "prompt_length", "repeats"])
def test_sizes_that_measure_nothing_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} 0 is too small; use 1 or more"):
        KvSettings(**{name: 0})


def test_one_new_token_has_no_decode_rate() -> None:
    with pytest.raises(ConfigError, match="max_new_tokens 1 is too small; use 2"):
        KvSettings(max_new_tokens=1)

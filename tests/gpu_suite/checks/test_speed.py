"""GPU-03: every base and batch is measured; out-of-memory errors and non-finite losses are detected."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from psannlm.benchmarks.harness import roofline
from psannlm.gpu_suite.checks import speed
from psannlm.gpu_suite.checks.rates import Rates, large_measures
from psannlm.gpu_suite.checks.speed import check_speed, fitting_rows
from psannlm.gpu_suite.context import CheckContext, Shape
from psannlm.reports.schemas.measured import Spread


@pytest.fixture(autouse=True)
def _small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the peak of small matrices: any figure serves, and that of large ones takes most of a check."""
    monkeypatch.setitem(roofline._EDGE, "cpu", 64)


@pytest.mark.slow
def test_speed_check_detects_non_finite_loss(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    original = speed.bench_train

    def lost(*arguments: Any, **settings: Any) -> Any:
        report = original(*arguments, **settings)
        report.rows[-1].losses[-1] = float("nan")
        return report

    monkeypatch.setattr(speed, "bench_train", lost)
    result = check_speed(context)
    assert all(measure.name.endswith("problems of the training that is timed") for measure in result.missed)
    assert len(result.missed) == 3 * len(context.sizes.batch_tokens) + 2
    assert any(note.endswith("respsann with GELU: a loss is not finite") for note in result.notes)


@pytest.mark.slow
def test_speed_check_measures_every_base_and_batch(context: CheckContext) -> None:
    result = check_speed(context)
    assert result.status == "ok", result.problems()
    for base in ("respsann", "waveresnet", "transformer"):
        assert len(result.series[f"{base}: training"]) == len(context.sizes.batch_tokens)
    assert all(rate > 0 for name, values in result.series.items() for rate in values)
    large = {m.name: m.value for m in result.measures if "the large model" in m.name}
    assert len(large) == 2 * 3, "problems, rate and utilisation of two bases"
    assert all(large[f"{base}, the large model: utilisation"] > 0 for base in ("waveresnet", "transformer"))


@pytest.mark.slow
def test_speed_check_out_of_memory_fails_large_model_only(
    context: CheckContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [measure.name for measure in check_speed(context).measures]
    original = speed.bench_train

    def short(settings: Any, *arguments: Any, **more: Any) -> Any:
        if settings.model.d_model == context.sizes.utilisation.d_model and settings.model.base == "waveresnet":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(settings, *arguments, **more)

    monkeypatch.setattr(speed, "bench_train", short)
    result = check_speed(context)
    assert [measure.name for measure in result.measures] == names
    assert [measure.name for measure in result.missed] == [
        "waveresnet, the large model: problems of the training that is timed"
    ]
    assert any("torch.OutOfMemoryError" in note for note in result.notes)
    values = {measure.name: measure.value for measure in result.measures}
    assert values["waveresnet, the large model: utilisation"] == 0.0
    assert values["transformer, the large model: utilisation"] > 0.0
    assert len(result.series["waveresnet: training"]) == len(context.sizes.batch_tokens)
    nothing = Rates(Spread.of([0.0]), None, 0.0, 1, float("nan"), ("out of memory",))
    assert not any(measure.is_met for measure in large_measures("waveresnet", nothing, "other"))


@pytest.mark.slow
def test_speed_check_skips_batches_that_do_not_fit(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    original = speed.bench_train

    def short(settings: Any, *arguments: Any, **more: Any) -> Any:
        if settings.batch_tokens == 1024:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(settings, *arguments, **more)

    monkeypatch.setattr(speed, "bench_train", short)
    result = check_speed(context)
    assert result.series["batch tokens"] == [512.0]
    assert any(note.startswith("1,024 batch tokens do not fit") for note in result.notes)


@pytest.mark.slow
def test_speed_measure_names_are_independent_of_memory(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = context.sizes.utilisation

    def names_and_notes(n_rows: int) -> tuple[list[str], str]:
        monkeypatch.setattr(speed, "fitting_rows", lambda *arguments: replace(shape, n_rows=n_rows))
        notes: list[str] = []
        measures = speed._utilisation(context, False, notes)
        return [measure.name for measure in measures], notes[0]

    (names, note), (fewer_names, fewer_note) = names_and_notes(8), names_and_notes(4)
    assert names == fewer_names
    assert "256 batch tokens" in note
    assert "128 batch tokens" in fewer_note


@pytest.mark.slow
def test_speed_check_rejects_infinite_throughput(context: CheckContext) -> None:
    with pytest.raises(ZeroDivisionError):
        check_speed(replace(context, clock=lambda: 1.0))


def test_fitting_rows_halves_until_it_fits() -> None:
    from psannlm.models.accounting import training_memory

    shape = Shape(d_model=32, n_layers=2, n_heads=2, vocab_size=64, seq_len=32, n_rows=8)
    config = shape.config("transformer")
    needed = training_memory(config, 4, 32, dtype=torch.float32, device_type="cuda").total
    found = fitting_rows(config, shape, torch.float32, int(needed / 0.79))
    assert found is not None
    assert found.n_rows == 4
    assert fitting_rows(config, shape, torch.float32, 1000) is None

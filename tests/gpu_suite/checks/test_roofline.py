"""Throughput limits of GPU-07: the memory roofline of a large model, in as many layers as fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from psannlm.gpu_suite.checks import roofline
from psannlm.gpu_suite.checks.roofline import (
    Roofline,
    fitting_layers,
    large_roofline_measures,
    roofline_measures,
    small_roofline_measures,
)
from psannlm.gpu_suite.context import FULL, CheckContext
from psannlm.models.accounting import count_parameters
from psannlm.reports.schemas.decoding import RooflineFraction
from psannlm.reports.schemas.measured import Spread


def roofline_at(fraction: float) -> Roofline:
    """Steps that read for this fraction of their time: 6 GB at 3 TB/s are 2 ms."""
    step_s = 2e-3 / fraction
    return Roofline.of(Spread.of([1 / step_s]), RooflineFraction.of(6_000_000_000, [3e12], [step_s]))


@pytest.mark.parametrize("is_compiled", [True, False])
def test_roofline_limit_detects_idle_memory(is_compiled: bool) -> None:
    limit = roofline.LARGE_LIMITS[is_compiled]

    def missed(fraction: float, *, is_dry_run: bool = False) -> list[str]:
        measures = roofline_measures("b, several GB", "how", roofline_at(fraction), limit, "", is_dry_run=is_dry_run)
        assert is_dry_run or all(measure.limit > 0 for measure in measures)
        return [measure.name for measure in measures if not measure.is_met]

    assert missed(limit + 0.01) == []
    assert missed(limit - 0.01) == ["b, several GB: one row, how", "b, several GB: roofline / step, how"]
    assert missed(0.001, is_dry_run=True) == []


def test_small_model_has_lower_roofline_limit() -> None:
    def missed(fraction: float, is_compiled: bool) -> int:
        measures = small_roofline_measures("b", roofline_at(fraction), "how", is_compiled=is_compiled, is_dry_run=False)
        return sum(not measure.is_met for measure in measures)

    assert missed(0.2, True) == missed(0.05, False) == 0, "healthy"
    assert missed(0.09, True) == missed(0.019, False) == 2


def test_large_roofline_runs_in_a_dry_run(context: CheckContext) -> None:
    notes: list[str] = []
    measures = large_roofline_measures(context, "waveresnet", notes)
    assert [measure.name for measure in measures] == [
        "waveresnet, several GB: one row, float32, plain",
        "waveresnet, several GB: roofline / step, float32, plain",
    ]
    assert all(measure.value > 0 and measure.is_met for measure in measures)
    assert notes[0].startswith("waveresnet, several GB: 64 wide, 2 layers, of ")


def test_large_roofline_out_of_memory_misses_limit(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*arguments: Any) -> Roofline:
        raise torch.OutOfMemoryError("CUDA out of memory")

    names = [measure.name for measure in large_roofline_measures(context, "waveresnet", [])]
    monkeypatch.setattr(roofline, "_decode_row", short)
    at_full_size = replace(context, is_dry_run=False)
    monkeypatch.setattr(roofline, "_LEAST_BYTES", 0.0)
    measures = large_roofline_measures(at_full_size, "waveresnet", [])
    assert [measure.name for measure in measures] == names
    assert not any(measure.is_met for measure in measures)
    assert str(measures[0]).endswith("torch.OutOfMemoryError")


@pytest.mark.parametrize(("free_gb", "n_layers"), [(141, 14), (80, 14), (24, 7), (16, 3), (12, 3), (8, None)])
def test_fitting_layers_halves_until_it_fits(free_gb: int, n_layers: int | None) -> None:
    found = fitting_layers(FULL.roofline, "waveresnet", free_gb * 10**9, roofline._LEAST_BYTES)
    assert (None if found is None else found.n_layers) == n_layers
    if found is not None:
        parameters = sum(count_parameters(found.config("waveresnet")).values())
        assert 2 * parameters >= 1.5e9, "several GB in bfloat16"
        assert 8 * parameters <= 0.8 * free_gb * 1e9


def test_large_roofline_notes_too_little_memory(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    assert large_roofline_measures(replace(context, is_dry_run=False), "waveresnet", notes) == []
    assert "waveresnet, several GB: left out, because" in notes[0]

"""Decoding time by context length: bytes, times and tokens of each run, and the plot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from psannlm.benchmarks.decoding.context_length import draw_growth, longest_state, measure_growth
from psannlm.benchmarks.harness.interleaved import RunProgress
from psannlm.benchmarks.harness.roofline import step_bytes
from psannlm.generation.engine import Engine
from psannlm.models.accounting import cache_bytes
from psannlm.models.kv_cache import KVCache
from psannlm.models.transformer import Transformer
from psannlm.reports.schemas.decoding import GrowthPoint


@pytest.fixture(autouse=True)
def collect_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip garbage collection between runs, which takes longer than runs of this size."""
    monkeypatch.setattr("gc.collect", lambda *generation: 0)


def test_growth_point_has_time_and_bytes_of_context(
    build_tiny: Callable[..., Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes a second per token that its rows see: the figure is the context itself, in every round."""
    engine = Engine(build_tiny(max_seq_len=64))
    now = 0.0
    step = engine.decode
    seen: list[list[int]] = []

    def slow_step(tokens: Tensor, state: KVCache) -> Tensor:
        nonlocal now
        logits = step(tokens, state)
        seen.append(list(state.lengths))
        now += state.lengths[0]
        return logits

    monkeypatch.setattr(engine, "decode", slow_step)
    monkeypatch.setattr(
        "psannlm.benchmarks.decoding.context_length.memory_reader", lambda *given, **named: lambda count: 1000.0
    )
    events: list[RunProgress] = []
    points = measure_growth(
        engine, 2, (16, 32), n_steps=8, repeats=3, seed=1, clock=lambda: now, on_progress=events.append
    )
    assert [point.context for point in points] == [16, 32]
    for point in points:
        # 4 short of the context, the 8 steps see 3 fewer to 4 more.
        assert point.step_s.lowest == point.step_s.highest == point.context + 0.5
        assert point.n_bytes == step_bytes(engine, 2, point.context)
        assert point.cache_bytes >= cache_bytes(engine.model.config, 2, point.context + 4)
    assert len(seen) == 2 * 4 * 8
    assert {len(lengths) for lengths in seen} == {2}
    assert {length for lengths in seen for length in lengths} == {*range(13, 21), *range(29, 37)}
    assert events[-1].unit == "steps"


def test_growth_runs_start_from_same_tokens(
    build_tiny: Callable[..., Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a short convolution, whose state is not wound back, the logits of all runs are equal."""
    engine = Engine(build_tiny(base="transformer", max_seq_len=64))
    step = engine.decode
    steps: list[Tensor] = []

    def record(tokens: Tensor, state: KVCache) -> Tensor:
        logits = step(tokens, state)
        steps.append(logits)
        return logits

    monkeypatch.setattr(engine, "decode", record)
    [point] = measure_growth(engine, 1, (16,), n_steps=4, repeats=2, seed=1)
    first, *others = (torch.stack(steps[start : start + 4]) for start in (0, 4, 8))
    assert all(torch.equal(first, other) for other in others)
    assert point.cache_bytes >= cache_bytes(engine.model.config, 1, 18)


def test_growth_without_contexts_is_empty(build_tiny: Callable[..., Transformer]) -> None:
    assert measure_growth(Engine(build_tiny()), 2, (), repeats=1, seed=1) == []
    assert (longest_state(()), longest_state((8, 4), 3)) == (0, 11)


def test_growth_plot_labels_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    points = [
        GrowthPoint.of(100, [1e4, 1e4], [0.02 * number, 0.04 * number], context=context, cache_bytes=10)
        for number, context in enumerate((256, 512), start=1)
    ]
    draw_growth(tmp_path / "decode.png", "a $title", points)
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")
    [axes] = drawn[0].axes
    assert axes.get_title() == "a $title"
    assert "tokens" in axes.get_xlabel()
    assert "ms" in axes.get_ylabel()
    assert axes.get_xscale() == "log"
    measured, floor = axes.get_lines()[0], axes.get_lines()[-1]
    assert list(measured.get_ydata()) == pytest.approx([30.0, 60.0])
    assert list(floor.get_ydata()) == pytest.approx([10.0, 10.0])

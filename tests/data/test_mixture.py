"""Mixtures of weighted sources: shares, repeats, and an order that is a pure function of (seed, epoch)."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psannlm.config.run import RunConfig, config_from_mapping
from psannlm.data.loader import Loader, Position
from psannlm.data.memory_store import store_from_ids
from psannlm.data.mixture import Mixture
from psannlm.data.windows import Windows
from psannlm.errors import ConfigError
from psannlm.training.metrics import read_metrics
from psannlm.training.run import train

SEQ_LEN = 8


def windows_of(sizes: list[list[int]], *, pack: bool = True) -> tuple[Windows, tuple[int, ...]]:
    """Windows over documents of the given lengths, a list for each source; source i has ids 10 + i only."""
    documents = [np.full(size, 10 + source) for source, lengths in enumerate(sizes) for size in lengths]
    firsts = tuple(np.cumsum([0, *map(len, sizes)])[:-1].tolist())
    store = store_from_ids(documents, bos_id=1, eos_id=2, vocab_size=64)
    return Windows(store, SEQ_LEN, pad_id=0, pack=pack), firsts


def seen(loader: Loader, n_epochs: int) -> list[list[int]]:
    return [loader.order(epoch).tolist() for epoch in range(n_epochs)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 60), st.floats(0.2, 5)), min_size=2, max_size=5),
    st.booleans(),
    st.integers(0, 9),
)
def test_mixture_shares_are_within_one_window(sources: list[tuple[int, float]], pack: bool, seed: int) -> None:
    windows, firsts = windows_of([[30] * n for n, _ in sources], pack=pack)
    weights = np.array([weight for _, weight in sources])
    wanted = weights / weights.sum() * len(windows)
    if wanted.min() < 1:
        return
    mixture = Mixture.of(windows, firsts, weights.tolist())
    loader = Loader(windows, 4, seed=seed, mixture=mixture)
    for order in seen(loader, 2):
        assert len(order) == len(windows)
        # All documents are of one length, so that windows of all sources have as many labels but at their borders.
        assert np.abs(np.array(mixture.count(np.array(order))) - wanted).max() < (1 if not pack else 2)


def test_mixture_ids_come_from_the_source() -> None:
    windows, firsts = windows_of([[5, 90, 40], [300], [2, 2, 700]])
    mixture = Mixture.of(windows, firsts, [1, 2, 1])
    order = Loader(windows, 4, seed=3, mixture=mixture).order(0)
    misfits = 0
    for index in set(order.tolist()):
        input_ids, _ = windows.batch([index])
        misfits += 10 + mixture.count(np.array([index])).index(1) not in input_ids
    # A window that begins with the last id of a source holds the next one's text.
    assert misfits <= 2


def test_mixture_passes_show_every_window_once() -> None:
    windows, firsts = windows_of([[400], [100]])
    mixture = Mixture.of(windows, firsts, [1, 3])
    loader = Loader(windows, 4, seed=5, mixture=mixture)
    for source, (first, end) in enumerate(zip(mixture.bounds, mixture.bounds[1:], strict=False)):
        # Places of the epochs are shuffled: what 2 epochs show differs by at most one pass in progress.
        counts = Counter(w for order in seen(loader, 2) for w in order if first <= w < end)
        passes = 2 * mixture.counts[source] / (end - first)
        assert set(counts.values()) <= {int(passes), int(passes) + 1}
        assert sum(counts.values()) == 2 * mixture.counts[source]
    assert mixture.repeats[1] > 2 > 1 > mixture.repeats[0]


def test_mixture_order_depends_on_seed_and_epoch_only() -> None:
    windows, firsts = windows_of([[400], [100], [300]])
    mixture = Mixture.of(windows, firsts, [1, 3, 2])
    loader = Loader(windows, 4, seed=5, mixture=mixture)
    whole = loader.order(1)
    pieces = [loader.order(1, at, min(at + 7, len(whole))) for at in range(0, len(whole), 7)]
    assert np.concatenate(pieces).tolist() == whole.tolist()
    assert loader.order(0).tolist() != whole.tolist()
    assert Loader(windows, 4, seed=6, mixture=mixture).order(1).tolist() != whole.tolist()
    ranks = [Loader(windows, 2, rank=rank, world_size=2, seed=5, mixture=mixture) for rank in (0, 1)]
    steps = [next(iter(rank.steps(Position(1, 8)))) for rank in ranks]
    found = sorted(i for step in steps for batch in step.micro_batches for i in batch.window_ids.tolist())
    assert found == sorted(whole[8:12].tolist())
    assert steps[0].source_windows == steps[1].source_windows == mixture.count(whole[8:12])


def test_mixture_refuses_a_source_without_windows() -> None:
    windows, firsts = windows_of([[400], [1], [300]])
    with pytest.raises(ConfigError, match=r"data\.sources\[1\]\.weight: the source has less than one window"):
        Mixture.of(windows, firsts, [1, 1, 1])
    windows, firsts = windows_of([[400], [300]])
    with pytest.raises(ConfigError, match=r"data\.sources\[1\]\.weight: weight 1e-06 is less than one of the"):
        Mixture.of(windows, firsts, [1, 1e-6])


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{"path": "a", "weight": 1}, {"path": "b"}], "data.sources: entry 2 has no weight"),
        ([{"path": "a", "weight": 1}], "data.sources: a single source is all of every epoch"),
        ([{"path": "a", "weight": 0}, {"path": "b", "weight": 1}], "data.sources[0].weight"),
        ([{"path": "a", "weight": float("nan")}, {"path": "b", "weight": 1}], "data.sources[0].weight"),
    ],
)
def test_weights_of_no_meaning_are_refused(sources: list[dict[str, object]], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_from_mapping({"data": {"sources": sources}})


def weighted_run(folder: Path, name: str, **changes: object) -> RunConfig:
    for source, n in (("tide", 40), ("harbour", 10)):
        lines = [f"The {source} of day {day} was {day * 7} feet high." for day in range(n)]
        (folder / f"{source}.txt").write_text("\n".join(lines), encoding="utf-8")
    sources = [
        {"path": str(folder / "tide.txt"), "per_line": True, "weight": 1},
        {"path": str(folder / "harbour.txt"), "per_line": True, "weight": 3},
    ]
    data = {"sources": sources, "tokenizer": "simple", "vocab_size": 300, "max_length": 16, "val_split": 0.1}
    model = {"base": "respsann", "d_model": 8, "n_layers": 1, "n_heads": 2}
    settings = {"batch_tokens": 64, "amp": "fp32", "device": "cpu", "checkpoint_dir": str(folder / name)}
    return config_from_mapping({"model": model, "data": data, "train": {**settings, "epochs": 2, **changes}})


@pytest.mark.slow
def test_weighted_run_counts_sources_and_resumes_exactly(tmp_path: Path) -> None:
    config = weighted_run(tmp_path, "whole", log_interval_steps=1, save_interval_steps=5, keep_checkpoints=99)
    result = train(config)
    rows = [row for row in read_metrics(tmp_path / "whole") if row["kind"] == "train"]
    counts = rows[-1]["source_windows"]
    assert counts[1] == pytest.approx(3 * counts[0], abs=4)
    resumed = weighted_run(tmp_path, "resumed", log_interval_steps=1, save_interval_steps=5, keep_checkpoints=99)
    train(resumed, resume=str(tmp_path / "whole" / "step_00000005"))
    again = [row for row in read_metrics(tmp_path / "resumed") if row["kind"] == "train"]
    assert json.dumps([(row["loss"], row["source_windows"]) for row in again]) == json.dumps(
        [(row["loss"], row["source_windows"]) for row in rows[-len(again) :]]
    )
    assert len(again) == result.steps - 5

"""Data loader: distribution of windows over ranks, order, resuming and prefetching."""

from __future__ import annotations

import threading
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psannlm.config.constants import IGNORE_INDEX
from psannlm.data.loader import Loader, Position, StepBatch
from psannlm.data.memory_store import store_from_ids
from psannlm.data.windows import Windows
from psannlm.errors import ArtifactError, ConfigError, CorpusError, TrainingError

T = 3


def make_windows(n: int) -> Windows:
    """Exactly ``n`` packed windows."""
    return Windows(store_from_ids([range(4, 4 + n * T - 1)], 1 << 20, bos_id=1, eos_id=2), T, pad_id=0)


def seen(step: StepBatch) -> list[int]:
    return [int(i) for micro_batch in step.micro_batches for i in micro_batch.window_ids]


def epoch_of(loader: Loader, position: Position) -> list[StepBatch]:
    """The steps from ``position`` to the end of its epoch."""
    steps = []
    for step in loader.steps(position):
        steps.append(step)
        if step.after.epoch > position.epoch:
            return steps
    raise AssertionError("steps ended")


sizes = {
    "n": st.integers(1, 40),
    "micro_batch_size": st.integers(1, 5),
    "grad_accum_steps": st.integers(1, 3),
    "world_size": st.integers(1, 5),
    "seed": st.integers(0, 3),
}


@pytest.mark.slow
@given(**sizes)
@settings(deadline=None)
def test_ranks_cover_each_step_without_overlap_and_in_step(
    n: int, micro_batch_size: int, grad_accum_steps: int, world_size: int, seed: int
) -> None:
    windows = make_windows(n)
    assert len(windows) == n
    ranks = [
        Loader(windows, micro_batch_size, grad_accum_steps, rank=rank, world_size=world_size, seed=seed)
        for rank in range(world_size)
    ]
    of_ranks = [epoch_of(loader, Position()) for loader in ranks]
    assert {len(steps) for steps in of_ranks} == {ranks[0].steps_per_epoch}
    covered: list[int] = []
    for together in zip(*of_ranks, strict=True):
        dealt = [i for step in together for i in seen(step)]
        assert len({step.after for step in together}) == 1
        assert {step.n_windows for step in together} == {len(dealt)}
        # Collectives wait for every rank: a rank with a micro-batch fewer would hang the others.
        assert len({len(step.micro_batches) for step in together}) == 1
        assert 1 <= len(together[0].micro_batches) <= grad_accum_steps
        assert max(len(seen(step)) for step in together) - min(len(seen(step)) for step in together) <= 1
        covered.extend(dealt)
    assert sorted(covered) == list(range(n))


@pytest.mark.slow
@given(**sizes, other_world=st.integers(1, 5), data=st.data())
@settings(deadline=None)
def test_loader_resumes_with_unseen_windows_for_any_ranks(
    n: int,
    micro_batch_size: int,
    grad_accum_steps: int,
    world_size: int,
    seed: int,
    other_world: int,
    data: st.DataObject,
) -> None:
    windows = make_windows(n)

    def loaders(world: int) -> list[Loader]:
        return [
            Loader(windows, micro_batch_size, grad_accum_steps, rank=rank, world_size=world, seed=seed)
            for rank in range(world)
        ]

    before = loaders(world_size)
    done = data.draw(st.integers(0, before[0].steps_per_epoch - 1))
    first = [list(islice(loader.steps(), done)) for loader in before]
    position = first[0][-1].after if done else Position()
    rest = [epoch_of(loader, position) for loader in loaders(other_world)]
    covered = [i for steps in [*first, *rest] for step in steps for i in seen(step)]
    assert sorted(covered) == list(range(n))


@pytest.mark.slow
@given(**sizes, done=st.integers(0, 20))
@settings(deadline=None)
def test_resuming_gives_exactly_the_remaining_steps(
    n: int, micro_batch_size: int, grad_accum_steps: int, world_size: int, seed: int, done: int
) -> None:
    def loader() -> Loader:
        return Loader(
            make_windows(n), micro_batch_size, grad_accum_steps, rank=world_size - 1, world_size=world_size, seed=seed
        )

    straight = list(islice(loader().steps(), done + 4))
    position = straight[done - 1].after if done else Position()
    for resumed, expected in zip(islice(loader().steps(position), 4), straight[done:], strict=True):
        assert resumed.after == expected.after
        assert len(resumed.micro_batches) == len(expected.micro_batches)
        for one, other in zip(resumed.micro_batches, expected.micro_batches, strict=True):
            assert torch.equal(one.input_ids, other.input_ids)
            assert torch.equal(one.labels, other.labels)
            assert one.n_labels == other.n_labels


def test_loader_order_depends_only_on_seed_and_epoch() -> None:
    windows = make_windows(200)
    base = Loader(windows, 4).order(0)
    for same in (Loader(windows, 7, 3), Loader(windows, 1, rank=2, world_size=4)):
        assert np.array_equal(same.order(0), base)
        same.order(5)
        np.random.default_rng(3).random()
        assert np.array_equal(same.order(0), base)
    others = [Loader(windows, 4, seed=1).order(0), *(Loader(windows, 4).order(epoch) for epoch in (1, 2))]
    assert all(not np.array_equal(other, base) for other in others)
    assert all(sorted(other) == list(range(200)) for other in others)


def test_loader_order_matches_earlier_versions() -> None:
    assert Loader(make_windows(10), 1, seed=1337).order(0).tolist() == PINNED_ORDER


PINNED_ORDER = [4, 3, 5, 0, 2, 1, 9, 7, 6, 8]


def test_every_epoch_of_an_endless_run_is_whole() -> None:
    loader = Loader(make_windows(7), 2)
    steps = list(islice(loader.steps(), 3 * loader.steps_per_epoch))
    for epoch in range(3):
        mine = steps[epoch * loader.steps_per_epoch : (epoch + 1) * loader.steps_per_epoch]
        assert sorted(i for step in mine for i in seen(step)) == list(range(7))
        assert mine[-1].after == Position(epoch + 1, 0)


def test_without_shuffling_windows_come_in_reading_order() -> None:
    steps = islice(Loader(make_windows(5), 2, shuffle=False).steps(), 3)
    assert [seen(step) for step in steps] == [[0, 1], [2, 3], [4]]


@given(**sizes, prefetch_factor=st.integers(0, 4), num_workers=st.integers(1, 4), done=st.integers(0, 12))
@settings(deadline=None, max_examples=40)
def test_loader_prefetching_changes_no_step(
    n: int,
    micro_batch_size: int,
    grad_accum_steps: int,
    world_size: int,
    seed: int,
    prefetch_factor: int,
    num_workers: int,
    done: int,
) -> None:
    def loader(**way: int) -> Loader:
        rank = {"rank": world_size - 1, "world_size": world_size, "seed": seed}
        return Loader(make_windows(n), micro_batch_size, grad_accum_steps, **rank, **way)

    plain = list(islice(loader(prefetch_factor=0).steps(), done + 3))
    position = plain[done - 1].after if done else Position()
    made = list(islice(loader(prefetch_factor=prefetch_factor, num_workers=num_workers).steps(position), 3))
    for one, other in zip(plain[done:], made, strict=True):
        assert (one.after, one.n_windows) == (other.after, other.n_windows)
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
            assert torch.equal(a.input_ids, b.input_ids)
            assert torch.equal(a.labels, b.labels)
            assert (a.n_labels, a.window_ids.tolist()) == (b.n_labels, b.window_ids.tolist())


def test_loader_prefetches_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = make_windows(40)
    ready = threading.Event()
    batch = windows.batch
    made: list[int] = []

    def watched(indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(1)
        if len(made) == 3:
            ready.set()
        return batch(indices)

    monkeypatch.setattr(windows, "batch", watched)
    steps = Loader(windows, 2).steps()
    next(steps)
    assert ready.wait(timeout=30)


def test_loader_data_error_reaches_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = make_windows(40)

    def broken(indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        raise ArtifactError("train_00000.safetensors is damaged")

    monkeypatch.setattr(windows, "batch", broken)
    with pytest.raises(ArtifactError, match="train_00000"):
        next(Loader(windows, 2).steps())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch-")]


def test_loader_rank_without_windows_gets_filler() -> None:
    step = next(Loader(make_windows(1), 4, rank=1, world_size=2).steps())
    (filler,) = step.micro_batches
    assert filler.n_labels == 0
    assert (filler.labels == IGNORE_INDEX).all()
    assert filler.input_ids.shape == filler.labels.shape == (1, T)
    assert step.n_windows == 1


@given(n=st.integers(1, 30), micro_batch_size=st.integers(1, 5))
def test_micro_batches_count_the_labels_of_their_windows(n: int, micro_batch_size: int) -> None:
    windows = make_windows(n)
    steps = epoch_of(Loader(windows, micro_batch_size), Position())
    assert sum(part.n_labels for step in steps for part in step.micro_batches) == windows.n_labels


@pytest.mark.parametrize("position", [Position(0, 6), Position(0, -1), Position(-1, 0)])
def test_a_position_outside_the_corpus_is_an_error(position: Position) -> None:
    with pytest.raises(TrainingError, match=f"window {position.window} of epoch {position.epoch}"):
        Loader(make_windows(5), 2).steps(position)


def test_loader_epoch_end_equals_next_start() -> None:
    loader = Loader(make_windows(5), 2)
    at_end, at_start = (next(loader.steps(position)) for position in (Position(0, 5), Position(1, 0)))
    assert at_end.after == at_start.after
    assert seen(at_end) == seen(at_start)


@pytest.mark.parametrize(
    ("settings_", "named"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"micro_batch_size": 1, "grad_accum_steps": 0}, "grad_accum_steps is 0"),
        ({"micro_batch_size": 1, "world_size": 0}, "world_size is 0"),
        ({"micro_batch_size": 1, "num_workers": 0}, "num_workers is 0"),
        ({"micro_batch_size": 1, "rank": 2, "world_size": 2}, "rank 2 is outside a world of 2"),
    ],
)
def test_loader_invalid_settings_raise(settings_: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Loader(make_windows(3), **settings_)  # type: ignore[arg-type]


def test_a_store_without_windows_is_refused() -> None:
    empty = Windows(store_from_ids([], 300, bos_id=1, eos_id=2), T, pad_id=0)
    with pytest.raises(CorpusError, match="no window"):
        Loader(empty, 1)


def test_pinned_batches_are_those_that_were_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs and labels of every micro-batch, a filler's too; nothing else changes."""
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    windows = make_windows(3)
    plain = [Loader(windows, 2, rank=rank, world_size=2) for rank in range(2)]
    steps = [epoch_of(loader, Position()) for loader in plain]
    assert pinned == []
    for rank in range(2):
        found = epoch_of(Loader(windows, 2, rank=rank, world_size=2, pin_memory=True), Position())
        for step, expected in zip(found, steps[rank], strict=True):
            for batch, other in zip(step.micro_batches, expected.micro_batches, strict=True):
                assert any(batch.input_ids is tensor for tensor in pinned)
                assert any(batch.labels is tensor for tensor in pinned)
                assert torch.equal(batch.input_ids, other.input_ids)
                assert torch.equal(batch.labels, other.labels)
                assert batch.n_labels == other.n_labels

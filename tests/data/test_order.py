"""Pseudo-random permutations: reproducible, uniform, and equal in slices."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psannlm.data.order import permuted, shuffled


def whole(n: int, seed: int, purpose: str = "epoch", index: int = 0) -> list[int]:
    return permuted(n, 0, n, seed, purpose, index).tolist()


@given(n=st.integers(0, 200), seed=st.integers(0, 2**63), index=st.integers(0, 10**6))
def test_shuffled_is_a_reproducible_permutation(n: int, seed: int, index: int) -> None:
    order = shuffled(n, seed, "epoch", index)
    assert sorted(order) == list(range(n))
    assert order.tolist() == shuffled(n, seed, "epoch", index).tolist()


def test_every_n_has_its_permutation() -> None:
    for n in (*range(300), 1023, 1024, 1025, 4095, 4096, 4097, 65_521, 65_536, 100_003):
        assert np.array_equal(np.sort(permuted(n, 0, n, n + 7, "epoch", n % 5)), np.arange(n)), n


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**63), data=st.data())
def test_a_slice_is_a_slice_of_the_whole(n: int, seed: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    assert permuted(n, start, stop, seed, "epoch").tolist() == whole(n, seed)[start:stop]


@pytest.mark.parametrize("n", [10**9, 10**12, 2**62])
def test_permuted_slice_of_huge_order_is_fast(n: int) -> None:
    tracemalloc.start()
    slices = [permuted(n, start, start + 500, 1, "epoch") for start in (0, n // 3, n - 500)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    found = np.concatenate(slices)
    assert len(np.unique(found)) == 1500
    assert ((found >= 0) & (found < n)).all()
    # 1,500 places in ten equal parts: a value beyond 33.7 has a chance of 1 in 10,000 (chi-square, 9 degrees).
    assert chi_square(np.bincount((found // (n // 10 + 1)).astype(np.int64), minlength=10)) < 33.7


def test_permuted_outside_positions_raise() -> None:
    for start, stop in ((-1, 2), (0, 6), (3, 2)):
        with pytest.raises(ValueError, match=f"positions {start} to {stop} are not within 5"):
            permuted(5, start, stop, 0, "epoch")


@pytest.mark.parametrize("draw", [shuffled, whole])
def test_seed_purpose_and_index_each_change_the_order(draw) -> None:  # type: ignore[no-untyped-def]
    draws = [draw(50, 1, "epoch", 0), draw(50, 2, "epoch", 0), draw(50, 1, "split", 0)]
    draws += [draw(50, 1, "epoch", 1), draw(50, 0, "epoch", 1)]
    assert len({tuple(order) for order in draws}) == len(draws)


def chi_square(counts: np.ndarray) -> float:  # type: ignore[type-arg]
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.slow
@pytest.mark.parametrize(("n", "limit"), [(2, 15.1), (3, 18.4), (5, 23.5), (10, 33.7), (37, 75.0)])
def test_first_and_last_places_are_even_over_epochs(n: int, limit: float) -> None:
    """Limits are the chi-square of n - 1 degrees that chance exceeds once in 10,000 times."""
    for place in (0, n - 1):
        drawn = [int(permuted(n, place, place + 1, 3, "epoch", epoch)[0]) for epoch in range(2000)]
        assert chi_square(np.bincount(drawn, minlength=n)) < limit


def test_all_orders_of_four_come_equally_often() -> None:
    seen = Counter(tuple(whole(4, 11, "epoch", epoch)) for epoch in range(2400))
    assert len(seen) == 24
    assert chi_square(np.array(list(seen.values()))) < 58.6  # 23 degrees, 1 in 10,000


def test_neighbours_are_far_apart_and_do_not_rise_together() -> None:
    n = 10_007
    for epoch in range(3):
        order = permuted(n, 0, n, 5, "epoch", epoch)
        steps = np.diff(order)
        # Distances of two random places average n / 3, with a standard error of 0.24 % of n here.
        assert abs(np.abs(steps).mean() / n - 1 / 3) < 0.01
        assert (np.abs(steps) == 1).sum() < 12
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
        assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.05


def test_two_epochs_have_nothing_to_do_with_each_other() -> None:
    n = 10_007
    one, other = (permuted(n, 0, n, 5, "epoch", epoch) for epoch in (0, 1))
    assert (one == other).sum() < 10  # one is to be expected
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.05


def test_first_places_are_even() -> None:
    firsts = [int(shuffled(4, seed, "epoch")[0]) for seed in range(2000)]
    assert all(400 < firsts.count(i) < 600 for i in range(4))

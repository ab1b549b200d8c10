"""An order is a permutation and a pure function of what it was asked with."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from psannlm.data.order import shuffled


@given(n=st.integers(0, 200), seed=st.integers(0, 2**63), index=st.integers(0, 10**6))
def test_an_order_holds_everything_once_and_comes_out_the_same_again(n: int, seed: int, index: int) -> None:
    order = shuffled(n, seed, "epoch", index)
    assert sorted(order) == list(range(n))
    assert order.tolist() == shuffled(n, seed, "epoch", index).tolist()


def test_seed_purpose_and_index_each_change_the_order() -> None:
    draws = [shuffled(50, 1, "epoch", 0), shuffled(50, 2, "epoch", 0), shuffled(50, 1, "split", 0)]
    draws += [shuffled(50, 1, "epoch", 1), shuffled(50, 0, "epoch", 1)]
    assert len({tuple(draw) for draw in draws}) == len(draws)


def test_first_places_are_even() -> None:
    firsts = [int(shuffled(4, seed, "epoch")[0]) for seed in range(2000)]
    assert all(400 < firsts.count(i) < 600 for i in range(4))

"""Interleaved runs: order, warm-ups, deadline, progress estimates and spreads."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable

import pytest

from psannlm.benchmarks.harness.interleaved import (
    Count,
    RunProgress,
    paired_ratio,
    passes_for,
    run_interleaved,
    shared_rounds,
    timed,
)
from psannlm.errors import ConfigError
from psannlm.reports.schemas.measured import Spread


class FakeClock:
    """Time that passes only where a test lets it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def spender(clock: FakeClock, *seconds: float) -> Callable[[], None]:
    """Return work whose calls take these times one by one."""
    pending = list(seconds)

    def work() -> None:
        clock.now += pending.pop(0)

    return work


def test_run_interleaved_alternates_and_discards_warm_ups() -> None:
    order: list[str] = []

    def candidate(name: str) -> Callable[[Count], int]:
        def run(count: Count) -> int:
            order.append(name)
            return len(order)

        return run

    results = run_interleaved({"A": candidate("A"), "B": candidate("B")}, 2, warm_ups=1, clock=FakeClock())
    assert order == ["A", "B"] * 3
    assert results == {"A": [3, 5], "B": [4, 6]}


def test_run_interleaved_obeys_interrupt_within_a_destructor() -> None:
    """Python drops the exception of a Ctrl-C that arrives there."""

    class Interrupting:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            # Signals are handled between two operations.
            for _ in range(100):
                pass

    made = []

    def candidate(count: Count) -> float:
        made.append(1)
        if len(made) == 2:
            Interrupting()
        return 1.0

    gc.disable()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_interleaved({"a": candidate}, 9, warm_ups=0)
    finally:
        gc.enable()
    assert len(made) == 2


def test_run_interleaved_zero_repeats_raises() -> None:
    with pytest.raises(ConfigError, match="repeats is 0; use 1 or more"):
        run_interleaved({"A": lambda count: 1}, 0)


def test_spread_uses_only_counted_runs() -> None:
    clock = FakeClock()
    candidates = {
        "slow start": timed(spender(clock, 50.0, 2.0, 1.0, 9.0), clock=clock),
        "steady": timed(spender(clock, 4.0, 4.0, 4.0, 4.0), clock=clock),
    }
    runs = run_interleaved(candidates, 3, clock=clock)
    assert Spread.of(runs["slow start"]) == Spread(median=2.0, lowest=1.0, highest=9.0)
    assert Spread.of(runs["steady"]) == Spread(4.0, 4.0, 4.0)


def test_spread_median_of_even_count() -> None:
    assert Spread.of([1.0, 10.0, 2.0, 4.0]) == Spread(3.0, 1.0, 10.0)


def test_paired_ratio_pairs_runs_of_one_turn() -> None:
    """The machine ran at half speed in the second round: the ratio does not see it, that of the medians would."""
    assert paired_ratio([2.0, 4.0, 2.0], [1.0, 2.0, 0.5]) == Spread(2.0, 2.0, 4.0)
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1.0], [1.0, 2.0])


def test_timed_returns_seconds_of_one_pass() -> None:
    clock = FakeClock()
    counts: list[tuple[int, int]] = []
    seconds = timed(spender(clock, 1.0, 2.0, 6.0), passes=3, clock=clock)(
        lambda done, total: counts.append((done, total))
    )
    assert seconds == 3.0
    assert counts == [(1, 3), (2, 3), (3, 3)]


def test_passes_for_fills_time_after_a_warm_up() -> None:
    clock = FakeClock()
    assert passes_for(spender(clock, 5.0, 0.03), 0.1, clock=clock) == 4
    assert passes_for(spender(clock, 5.0, 0.2), 0.1, clock=clock) == 1


def test_time_left_estimates_remaining_runs() -> None:
    clock = FakeClock()
    events: list[RunProgress] = []

    def halves(seconds: float) -> Callable[[Count], None]:
        def run(count: Count) -> None:
            clock.now += seconds / 2
            count(1, 2)
            clock.now += seconds / 2

        return run

    run_interleaved({"A": halves(2.0), "B": halves(10.0)}, 1, clock=clock, on_progress=events.append, unit="tokens")
    assert [(s.candidate, s.run, s.is_warm_up, s.done) for s in events] == [
        ("A", 1, True, 0),
        ("A", 1, True, 1),
        ("B", 2, True, 0),
        ("B", 2, True, 1),
        ("A", 3, False, 0),
        ("A", 3, False, 1),
        ("B", 4, False, 0),
        ("B", 4, False, 1),
    ]
    # Nothing is known at first; then A takes 2 and B is guessed to; half way through B it is known to take 10.
    assert [s.left_s for s in events] == [None, 1 + 2 + 2 + 2, None, 5 + 2 + 10, 12, 11, 10, 5]
    assert str(events[3]) == "run 2 of 4 (warm-up, B), 1 of 2 tokens, 0.2 tokens/s, about 0:00:17 left"


def test_deadline_allows_one_counted_run_per_candidate() -> None:
    clock = FakeClock()
    made: list[tuple[str, bool, float]] = []

    def takes(seconds: float) -> Callable[[Count], float]:
        def run(count: Count) -> float:
            clock.now += seconds
            return seconds

        return run

    candidates = {"short": takes(1.0), "long": takes(30.0)}
    results = run_interleaved(
        candidates,
        5,
        clock=clock,
        deadline=clock.now + 35.0,
        cold=["long"],
        on_result=lambda *made_now: made.append(made_now),
    )
    # 1 s of warm-up, then 31 s of the first round: three seconds are left for the short one.
    assert results == {"short": [1.0, 1.0, 1.0, 1.0], "long": [30.0]}
    assert [(name, is_warm_up) for name, is_warm_up, _ in made[:3]] == [
        ("short", True),
        ("short", False),
        ("long", False),
    ]


def test_time_left_excludes_runs_beyond_the_deadline() -> None:
    clock = FakeClock()
    events: list[tuple[float, RunProgress]] = []

    def run(count: Count) -> None:
        clock.now += 10.0

    run_interleaved(
        {"A": run},
        5,
        clock=clock,
        deadline=clock.now + 25.0,
        cold=["A"],
        on_progress=lambda event: events.append((clock.now - 100.0, event)),
    )
    # Two runs fit into 25 seconds; without the deadline, 40 would be left after the first.
    assert [(now, event.left_s) for now, event in events] == [(0.0, None), (10.0, 10.0)]


def test_time_left_never_exceeds_the_deadline() -> None:
    clock = FakeClock()
    deadline = clock.now + 35.0
    events: list[tuple[float, RunProgress]] = []

    def takes(seconds: float) -> Callable[[Count], None]:
        def run(count: Count) -> None:
            for done in range(1, 5):
                clock.now += seconds / 4
                count(done, 4)

        return run

    run_interleaved(
        {"short": takes(4.0), "long": takes(30.0)},
        5,
        clock=clock,
        deadline=deadline,
        on_progress=lambda event: events.append((clock.now, event)),
    )
    # The counted run of "long" is made in any case, and ends after the deadline.
    assert clock.now > deadline
    assert all(event.left_s is None for now, event in events if now >= deadline)
    shown = [(now, event.left_s) for now, event in events if event.left_s is not None]
    assert len(shown) > 5
    assert all(left_s <= deadline - now for now, left_s in shown)


def test_shared_rounds_are_the_earliest_of_both() -> None:
    assert shared_rounds([1.0, 2.0, 3.0], [4.0]) == ([1.0], [4.0])

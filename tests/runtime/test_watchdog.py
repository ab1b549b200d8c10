"""Watchdog of ranks: who prints which failure, and for whom it waits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch.distributed as dist

from psannlm.errors import EXIT_FAILED, AlreadyReported, RankError
from psannlm.runtime import watchdog as watchdog_module
from psannlm.runtime.watchdog import RankWatchdog, Store

BROKEN = RuntimeError("Connection closed by peer")


@dataclass
class Clock:
    """In place of the module ``time``: every reading and every sleep lets it run, and the ranks that live beat."""

    now: float = 0.0
    beat: Callable[[str], None] = lambda now: None

    def monotonic(self) -> float:
        self.now += 0.1
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.beat(str(self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog_module, "time", clock)
    return clock


@pytest.fixture
def store() -> Store:
    """The store of three ranks that have joined."""
    store = dist.HashStore()
    for rank in range(3):
        store.set(f"alive/{rank}", "1")
    return store


def test_watchdog_waits_for_no_report_of_dead_rank_0(store: Store, clock: Clock) -> None:
    clock.beat = lambda now: store.set("alive/2", now)
    error = RankWatchdog(store, 1, 3).resolve_error(BROKEN)
    assert isinstance(error, RankError)
    assert "rank 0: gone" in str(error)
    assert clock.now < watchdog_module._SEARCH_BEATS + 1


def test_watchdog_lets_rank_0_report_another_dead_rank(store: Store, clock: Clock) -> None:
    def rank_0_lives(now: str) -> None:
        store.set("alive/0", now)
        if store.check(["failure"]) and clock.now > watchdog_module._SEARCH_BEATS + 2:
            store.set("reported", "yes")

    clock.beat = rank_0_lives
    error = RankWatchdog(store, 1, 3).resolve_error(BROKEN)
    assert isinstance(error, AlreadyReported)
    assert "rank 2: gone" in str(error)


def test_watchdog_tells_a_late_rank_from_dead_one(store: Store, clock: Clock) -> None:
    """On a busy machine a rank may be silent for longer than the search takes at least."""
    clock.beat = lambda now: store.set("alive/1", "late" if clock.now > watchdog_module._SEARCH_BEATS + 3 else "1")
    error = RankWatchdog(store, 0, 3).resolve_error(BROKEN)
    assert isinstance(error, RankError)
    assert "rank 2: gone" in str(error)


def test_watchdog_tells_a_done_rank_from_dead_one(store: Store, clock: Clock) -> None:
    """A rank may be killed in the very last collective, which others have left."""
    RankWatchdog(store, 1, 3).close(is_done=True)
    error = RankWatchdog(store, 0, 3).resolve_error(BROKEN)
    assert isinstance(error, RankError)
    assert "rank 2: gone" in str(error)
    assert clock.now < watchdog_module._SEARCH_BEATS + 4


@pytest.mark.parametrize("rank", [0, 1])
def test_watchdog_awaits_error_that_all_ranks_know(store: Store, clock: Clock, rank: int) -> None:
    """Of the rank that failed, however long it takes: its message says more."""

    def rank_2_publishes(now: str) -> None:
        if clock.now > 4 * watchdog_module._SEARCH_BEATS and not store.check(["failure"]):
            store.set("failure", json.dumps({"rank": 2, "message": "not saved: full", "exit_code": 1, "by": 2}))

    clock.beat = rank_2_publishes
    error = RankWatchdog(store, rank, 3).resolve_error(RankError("rank 2: full", EXIT_FAILED))
    assert isinstance(error, RankError)
    assert isinstance(error, AlreadyReported) == (rank != 0)
    assert str(error) == "rank 2: not saved: full"

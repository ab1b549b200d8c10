"""What a rank does, and which rank the others wait for."""

from __future__ import annotations

import threading
import time

import pytest

from psannlm.runtime.rank_activity import Activity, MainThread, StallMonitor, entering_collective, find_stall

WAITING = Activity(7, "all_reduce", "training/step.py:93 in train_step")
BUSY = Activity(6, "", "data/loader.py:80 in steps")
ALONE = Activity(7, "barrier", "mine.py:3 in on_step")


def test_activity_survives_store_in_constant_length() -> None:
    texts = [activity.encode() for activity in (WAITING, BUSY, Activity(8, "o" * 99, "ü" * 999))]
    assert len({len(text.encode("ascii")) for text in texts}) == 1
    assert [Activity.decode(text) for text in texts[:2]] == [WAITING, BUSY]
    assert Activity.decode("000000000012") is None


def test_stall_names_the_rank_that_others_wait_for() -> None:
    assert find_stall({0: WAITING, 1: WAITING}, 120) is None
    assert find_stall({0: BUSY, 1: BUSY}, 120) is None
    slow = find_stall({0: WAITING, 1: WAITING, 2: BUSY, 3: WAITING}, 120)
    assert slow is not None
    assert (slow.rank, slow.is_deadlock) == (2, False)
    assert "3 of 4 ranks have waited 120 s for it in all_reduce at training/step.py:93" in slow.message
    assert slow.message.endswith("it is at data/loader.py:80 in steps")


@pytest.mark.parametrize(
    ("ranks", "odd"),
    [
        ({0: WAITING, 1: ALONE, 2: WAITING}, 1),
        ({0: ALONE, 1: WAITING, 2: WAITING}, 0),
        # Of two, the one that has entered more.
        ({0: WAITING, 1: Activity(8, "barrier", "mine.py:3 in on_step")}, 1),
        ({0: Activity(9, "all_reduce", "mine.py:3 in on_step"), 1: WAITING}, 0),
    ],
)
def test_stall_in_different_operations_is_a_deadlock(ranks: dict[int, Activity], odd: int) -> None:
    stall = find_stall(ranks, 120)
    assert stall is not None
    assert (stall.rank, stall.is_deadlock) == (odd, True)
    assert f"{ranks[odd].operation} at mine.py:3 in on_step, a collective" in stall.message


def test_stall_monitor_reports_once_and_not_early() -> None:
    monitor, found = StallMonitor(3), []
    for beat in range(10):
        # The slow rank goes from line to line.
        found.append(monitor.update({0: WAITING, 1: Activity(6, "", f"data/loader.py:{beat} in steps")}))
    assert [stall is not None for stall in found] == [beat == 3 for beat in range(10)]
    for beat in range(10):
        assert monitor.update({0: Activity(beat, "all_reduce", "a"), 1: BUSY}) is None


def test_main_thread_is_seen_from_another_thread() -> None:
    seen: list[Activity] = []
    main = MainThread()
    watcher = threading.Thread(target=lambda: (time.sleep(0.05), seen.append(main.observe())))
    entering_collective()
    watcher.start()
    while watcher.is_alive():
        time.sleep(0.001)
    assert seen[0].operation == ""
    assert seen[0].n_collectives >= 1
    assert seen[0].place.startswith("test_rank_activity.py:")
    assert seen[0].place.endswith(" in test_main_thread_is_seen_from_another_thread")

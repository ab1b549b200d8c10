"""Prefetching: order of results, limits, errors and the end of threads."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import count, islice

import pytest

from psannlm.data.prefetch import prefetched


def alive() -> int:
    return sum(thread.name.startswith("prefetch-") for thread in threading.enumerate())


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("ahead", [0, 1, 2, 7])
def test_prefetch_results_equal_map(threads: int, ahead: int) -> None:
    # Work of uneven length, so that threads overtake each other.
    work = [(i * 7919) % 13 * 300 for i in range(60)]
    assert list(prefetched(lambda n: sum(range(n)), work, ahead=ahead, threads=threads)) == [
        sum(range(n)) for n in work
    ]
    assert alive() == 0


def test_prefetch_stays_within_its_limit() -> None:
    made: list[int] = []
    third = threading.Event()

    def make(i: int) -> int:
        made.append(i)
        if len(made) == 4:
            third.set()
        return i

    results = prefetched(make, count(), ahead=3)
    assert next(results) == 0
    assert third.wait(timeout=30), "three more were to be made unasked"
    assert not third.clear()
    assert len(made) == 4
    results.close()  # type: ignore[attr-defined]
    assert made == [0, 1, 2, 3]


class Broken(BaseException):
    """No Exception, so that a handler for those would let it through."""


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("place", ["make", "items"])
def test_prefetch_error_follows_earlier_results(place: str, threads: int) -> None:
    error = Broken("the fifth")

    def items() -> Iterator[int]:
        for i in count():
            if place == "items" and i == 5:
                raise error
            yield i

    def make(i: int) -> int:
        if place == "make" and i == 5:
            raise error
        return i

    results = prefetched(make, items(), ahead=4, threads=threads)
    assert list(islice(results, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(Broken) as caught:
        next(results)
    assert caught.value is error
    assert alive() == 0


def test_threads_end_when_the_caller_stops_raises_or_forgets() -> None:
    for _ in prefetched(lambda i: i, count(), ahead=2, threads=3):
        break
    assert alive() == 0

    def raising() -> None:
        for _ in prefetched(lambda i: i, count(), ahead=2, threads=3):
            raise KeyError("in the body of the loop")

    with pytest.raises(KeyError):
        raising()
    assert alive() == 0
    results = prefetched(lambda i: i, count(), ahead=2, threads=3)
    next(results)
    assert alive() == 3
    del results
    assert alive() == 0


def test_prefetch_open_iterator_does_not_delay_exit() -> None:
    code = (
        "from itertools import count; from psannlm.data.prefetch import prefetched\n"
        "results = prefetched(lambda i: i, count(), ahead=2, threads=3); print(next(results))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")

"""Work items enter; their results leave in order, made by threads that stay a bounded number of items ahead."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetched(make: Callable[[T], R], items: Iterable[T], *, ahead: int, threads: int = 1) -> Iterator[R]:
    """Yield ``make(item)`` for each item, in order, up to ``ahead`` results being ready before they are asked for.

    ``make`` runs on ``threads`` threads and ``items`` is advanced by one at a time; with ``ahead`` 0 both run here,
    when a result is asked for. An error of either is raised where its result would have come. The threads start with
    the first result and end when the caller stops asking (closes or drops the iterator) or meets an error; being
    daemons, they never hold up the end of the interpreter.
    """
    if ahead < 1:
        yield from map(make, items)
        return
    line = _Line(make, iter(items), ahead)
    workers = [threading.Thread(target=line.work, name=f"prefetch-{i}", daemon=True) for i in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield from line.results()
    finally:
        line.stop()
        for worker in workers:
            # A dropped iterator that is part of a circle may be cleared away on any thread, also on one of these.
            if worker is not threading.current_thread():
                worker.join()


class _Slot(Generic[R]):
    """Room for one result: ``value`` or ``error`` holds it once ``is_done``."""

    __slots__ = ("error", "is_done", "value")

    def __init__(self) -> None:
        self.is_done = False
        self.value: R | None = None
        self.error: BaseException | None = None


class _Line(Generic[T, R]):
    """Slots in order of their items, filled by workers and emptied by the caller."""

    def __init__(self, make: Callable[[T], R], items: Iterator[T], ahead: int) -> None:
        self._make, self._items, self._ahead = make, items, ahead
        self._slots: deque[_Slot[R]] = deque()
        self._changed = threading.Condition()
        self._is_over = self._is_stopped = False

    def work(self) -> None:
        while (taken := self._take()) is not None:
            item, slot = taken
            try:
                slot.value = self._make(item)
            except BaseException as error:  # noqa: BLE001 - handed to the caller, who raises it as it is
                slot.error = error
            with self._changed:
                slot.is_done = True
                self._changed.notify_all()

    def _take(self) -> tuple[T, _Slot[R]] | None:
        """Take the next item and a slot for it, waiting for room; None when there is nothing left to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or self._is_over or len(self._slots) < self._ahead)
            if self._is_stopped or self._is_over:
                return None
            slot: _Slot[R] = _Slot()
            try:
                item = next(self._items)
            except StopIteration:
                self._is_over = True
            except BaseException as error:  # noqa: BLE001 - as above
                self._is_over = True
                slot.error, slot.is_done = error, True
                self._slots.append(slot)
            else:
                self._slots.append(slot)
                return item, slot
            self._changed.notify_all()
            return None

    def results(self) -> Iterator[R]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._slots[0].is_done if self._slots else self._is_over)
                if not self._slots:
                    return
                slot = self._slots.popleft()
                self._changed.notify_all()
            if slot.error is not None:
                raise slot.error
            yield slot.value  # type: ignore[misc]

    def stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

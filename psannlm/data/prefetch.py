"""Ordered prefetching: threads compute results a bounded number of items in advance."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetched(make: Callable[[T], R], items: Iterable[T], *, ahead: int, threads: int = 1) -> Iterator[R]:
    """Yield ``make(item)`` for each item, in order, computing up to ``ahead`` results in advance.

    ``make`` runs on ``threads`` threads, and one thread at a time advances ``items``; with ``ahead`` 0 both run in the
    caller. An error of either is raised in place of its result. The threads start with the first result and end when
    the iterator is closed, dropped or raises; they are daemons, so they never delay the exit of the interpreter.
    """
    if ahead < 1:
        yield from map(make, items)
        return
    queue = _OrderedQueue(make, iter(items), ahead)
    workers = [threading.Thread(target=queue.work, name=f"prefetch-{i}", daemon=True) for i in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield from queue.results()
    finally:
        queue.stop()
        for worker in workers:
            # The garbage collector may close the iterator on any thread, including these.
            if worker is not threading.current_thread():
                worker.join()


class _Slot(Generic[R]):
    """One result: ``value`` or ``error``, once ``is_done``."""

    __slots__ = ("error", "is_done", "value")

    def __init__(self) -> None:
        self.is_done = False
        self.value: R | None = None
        self.error: BaseException | None = None


class _OrderedQueue(Generic[T, R]):
    """Slots in the order of their items, filled by workers and emptied by the caller."""

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
            except BaseException as error:  # noqa: BLE001 - results() raises it in the caller, who would wait forever
                slot.error = error
            with self._changed:
                slot.is_done = True
                self._changed.notify_all()

    def _take(self) -> tuple[T, _Slot[R]] | None:
        """Take the next item and a slot for it, waiting until one is free; None when there are no more items."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or self._is_over or len(self._slots) < self._ahead)
            if self._is_stopped or self._is_over:
                return None
            slot: _Slot[R] = _Slot()
            try:
                item = next(self._items)
            except StopIteration:
                self._is_over = True
            except BaseException as error:  # noqa: BLE001 - as above: a thread reports to nobody else
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

"""Activity of the ranks of a process group: what each one does, and which rank the others wait for.

Once a second the watchdog of a rank looks at the stack of the main thread and publishes where it is. If ranks have
waited in a collective operation for two minutes, the activities show why: a rank computes, reads or writes and has not
entered it; or every rank waits, in different operations, which none can ever complete.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

# Beats of the watchdog, one per second, after which a rank that the others wait for is named.
STALL_BEATS = 120
_ROOT = str(Path(__file__).resolve().parents[1])
_RUNTIME = str(Path(__file__).resolve().parent)
_LIBRARIES = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib"))
_OPERATION_CHARS, _PLACE_CHARS = 32, 120
# A thread that uses less of a processor than this waits for something.
_IDLE_FRACTION = 0.2
_BACKWARD = "backward pass"
# Number of the collective operations of this process that ranks enter alike, apart from those that torch enters.
_n_entered = 0


def entering_collective() -> None:
    """Count a collective operation that the main thread is about to enter."""
    global _n_entered
    _n_entered += 1


@dataclass(frozen=True)
class Activity:
    """What a rank does.

    Attributes:
        n_collectives: collective operations that it has entered (:func:`entering_collective`).
        operation: the operation in which its main thread waits for other ranks, such as ``all_reduce``, or an empty
            text.
        place: innermost line of the training code, such as ``training/loop.py:97 in _save``.
    """

    n_collectives: int
    operation: str
    place: str

    def encode(self) -> str:
        """Return a text of constant length, so that a store can overwrite it in place."""
        operation, place = (text.encode("ascii", "replace").decode() for text in (self.operation, self.place))
        return (
            f"{self.n_collectives:012d}|{operation[:_OPERATION_CHARS]:{_OPERATION_CHARS}}|"
            f"{place[:_PLACE_CHARS]:{_PLACE_CHARS}}"
        )

    @classmethod
    def decode(cls, text: str) -> Activity | None:
        """Return the activity of :meth:`encode`; None where ``text`` is not one."""
        parts = [part.strip() for part in text.split("|", 2)]
        return cls(int(parts[0]), parts[1], parts[2]) if len(parts) == 3 and parts[0].isdecimal() else None


class MainThread:
    """Observation of the main thread of this process from another thread."""

    def __init__(self) -> None:
        self._id = threading.main_thread().ident or 0
        self._cpu_s, self._at_s = self._cpu_time(), time.monotonic()

    def observe(self) -> Activity:
        """Return what the main thread does now. A backward pass counts as waiting if it used no processor lately."""
        cpu_s, at_s = self._cpu_time(), time.monotonic()
        is_idle = cpu_s is not None and self._cpu_s is not None
        is_idle = is_idle and (cpu_s or 0) - (self._cpu_s or 0) < _IDLE_FRACTION * (at_s - self._at_s)
        self._cpu_s, self._at_s = cpu_s, at_s
        operation, place = _read_stack(sys._current_frames().get(self._id))
        if operation == _BACKWARD and not is_idle:
            operation = ""
        return Activity(_n_entered, operation, place)

    def _cpu_time(self) -> float | None:
        clock_of = getattr(time, "pthread_getcpuclockid", None)  # not on macOS and Windows
        return None if clock_of is None else float(time.clock_gettime(clock_of(self._id)))


def _read_stack(frame: FrameType | None) -> tuple[str, str]:
    """Return the collective operation that a stack is in, or an empty text, and its innermost line of other code."""
    operation = ""
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        is_torch = f"{os.sep}torch{os.sep}" in path
        if path.startswith(_RUNTIME) and (name, os.path.basename(path)) == ("read", "device.py"):
            operation = operation or "wait for the device"
        elif is_torch and not operation:
            if f"{os.sep}distributed{os.sep}" in path and name != "wrapper":
                operation = name.strip("_")
            elif name == "_engine_run_backward":
                operation = _BACKWARD
        elif path.startswith(_ROOT) and not path.startswith(_RUNTIME):
            return operation, f"{os.path.relpath(path, _ROOT)}:{frame.f_lineno} in {name}"
        elif not path.startswith((_ROOT, "<", *_LIBRARIES)):  # a callback
            return operation, f"{os.path.basename(path)}:{frame.f_lineno} in {name}"
        frame = frame.f_back
    return operation, ""


@dataclass(frozen=True)
class Stall:
    """A rank that the others wait for. ``is_deadlock``: every rank waits, in operations that do not belong together."""

    rank: int
    message: str
    is_deadlock: bool


class StallMonitor:
    """Detection of a stall from the activities of all ranks, one call per beat."""

    def __init__(self, limit_beats: int = STALL_BEATS) -> None:
        self._limit = limit_beats
        self._former: dict[int, Activity | int] = {}
        self._n_beats = 0

    def update(self, activities: Mapping[int, Activity]) -> Stall | None:
        """Return the stall if all waiting ranks have waited at one place for the limit; once for each stall."""
        # A rank that does not wait may go from line to line, as long as it enters no collective operation.
        now = {rank: each if each.operation else each.n_collectives for rank, each in activities.items()}
        self._n_beats = self._n_beats + 1 if now == self._former else 0
        self._former = now
        return find_stall(activities, self._n_beats) if self._n_beats == self._limit else None


def find_stall(activities: Mapping[int, Activity], seconds: int) -> Stall | None:
    """Return which rank keeps the others waiting, given that they have waited for ``seconds``; None if none does."""
    waiting = {rank: activity for rank, activity in activities.items() if activity.operation}
    absent = [rank for rank in sorted(activities) if rank not in waiting]
    if not waiting:
        return None
    if absent:
        others = _where(next(iter(waiting.values())))
        more = f" (like rank {', '.join(map(str, absent[1:]))})" if absent[1:] else ""
        at = activities[absent[0]].place or "an unknown line"
        message = (
            f"is slow{more}: {len(waiting)} of {len(activities)} ranks have waited {seconds} s for it {others}; it is "
            f"at {at}"
        )
        return Stall(absent[0], message, is_deadlock=False)
    kinds = Counter((activity.n_collectives, activity.operation) for activity in waiting.values())
    if len(kinds) == 1:
        return None
    # The odd one out; of equally many, the one that is ahead.
    common, _ = max(kinds.items(), key=lambda item: (item[1], -item[0][0]))
    odd = min(rank for rank, each in waiting.items() if (each.n_collectives, each.operation) != common)
    rest = next(each for each in waiting.values() if (each.n_collectives, each.operation) == common)
    message = (
        f"waits {_where(waiting[odd])}, a collective operation that other ranks have not entered: they have waited "
        f"{seconds} s {_where(rest)}. Every rank must make the same calls; a callback runs on rank 0 only"
    )
    return Stall(odd, message, is_deadlock=True)


def _where(activity: Activity) -> str:
    return f"in {activity.operation} at {activity.place or 'an unknown line'}"

"""Rank watchdog: heartbeats and failure reports between the ranks of a process group, so that all end if one fails.

A collective operation cannot be cancelled: if a rank fails, the others block in it until a time limit of half an hour.
Therefore every rank runs a thread that reads, from the key-value store of the group, the first error of any rank and
the heartbeats of the others. Rank 0 prints the error, and every rank exits.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, TypeVar

import torch.distributed as dist

from psannlm.errors import EXIT_FAILED, AlreadyReported, Interrupted, PsannlmError, RankError, describe
from psannlm.runtime.launch import LAUNCHED
from psannlm.runtime.rank_activity import Activity, MainThread, StallMonitor
from psannlm.runtime.streams import is_terminal, print_error_line

T = TypeVar("T")
log = logging.getLogger(__name__)

# A rank counts as dead after this many heartbeats of the observer without one of its own. Heartbeats are counted, not
# seconds, because a clock keeps running while the whole job is suspended.
_BEAT_S = 1.0
_SILENT_BEATS = 18
# In place of the heartbeat of a rank that has left with its work done.
_DONE = b"done"
# After an error on another rank, the main thread gets this long to fail in a broken collective by itself and clean up.
_GRACE_S = 3.0
# A rank with an error waits this long for rank 0 to print it, then prints it itself.
_REPORT_S = 8.0
# Rank 0 gets this long to finish (the loss curve) after an end that all ranks agreed on.
_AGREED_S = 60.0
# A broken connection is detected before the rank that caused it is known: look for it during this many heartbeats, and
# longer where several ranks are silent, since on a busy machine a living one can be late.
_SEARCH_BEATS, _MOST_SEARCH_BEATS = 5, 12


@dataclass(frozen=True)
class RankFailure:
    """The first error of a group: the failed rank, its message, the exit code, and the rank ``by`` that reported it."""

    rank: int
    message: str
    exit_code: int
    by: int

    @property
    def is_dead(self) -> bool:
        """Whether another rank reported the failure, because the failed rank is dead."""
        return self.rank != self.by

    def __str__(self) -> str:
        return self.message if self.by == self.rank == 0 else f"rank {self.rank}: {self.message}"


class Store(Protocol):
    """The methods used of a key-value store. Each raises RuntimeError if the store is gone."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def multi_get(self, keys: list[str]) -> list[bytes]: ...

    def check(self, keys: list[str]) -> bool: ...

    def add(self, key: str, amount: int) -> int: ...

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes: ...


class RankWatchdog:
    """Watchdog thread of this rank, running from :meth:`start` to :meth:`close`; all ranks share ``store``.

    Until :meth:`join`, a rank without a heartbeat is one that has not started yet.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self.rank, self.size = store, rank, size
        self._lock = threading.Lock()
        self._is_reported = False
        self._is_store_lost = False
        self._failure: RankFailure | None = None
        self._is_leaving, self._closed = threading.Event(), threading.Event()
        self._has_joined = threading.Event()
        self._main_thread, self._stalls = MainThread(), StallMonitor()
        self._beats = 0
        self._seen: dict[int, bytes] = {}
        self._silent: dict[int, int] = {}
        self._thread = threading.Thread(target=self._watch, name="rank-watchdog", daemon=True)
        self._beat()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self) -> None:
        """Watch all ranks from now on. Every rank must have constructed its watchdog before."""
        self._has_joined.set()

    def close(self, *, is_done: bool = False) -> None:
        """Stop the thread. ``is_done`` says that this rank needs nothing more of the others, and is no dead one."""
        self._is_leaving.set()
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=_REPORT_S)
        if is_done:
            self._call(lambda: self._store.set(f"alive/{self.rank}", _DONE.decode("ascii")), None)

    def resolve_error(self, error: BaseException) -> BaseException:
        """Return the exception that the main thread must raise because of ``error``, so that one rank prints one error.

        That is ``AlreadyReported`` if another rank prints the error, and ``RankError`` on rank 0 if another rank failed
        first.
        """
        self._is_leaving.set()
        if isinstance(error, Interrupted):
            return self._handle_agreed(error)
        own = RankFailure(self.rank, describe(error), getattr(error, "exit_code", EXIT_FAILED), self.rank)
        fault = self._fault_of_other(error)
        failure = fault or self._publish(own)
        if self.rank == 0:
            was_reported, self._is_reported = self._is_reported, True
            was_reported |= fault is not None and fault.is_dead and LAUNCHED in os.environ
            self._mark_reported()
            # The store may be hosted by this process: keep it until the other ranks have read the failure.
            self._until(
                lambda: self._call(lambda: self._store.add("informed", 0), self.size) >= self.size - 1, _GRACE_S
            )
            if was_reported:
                return AlreadyReported(str(failure), failure.exit_code)
            # An error that occurs on all ranks is raised as rank 0's own.
            return error if failure.message == own.message else RankError(str(failure), failure.exit_code)
        if failure.by != self.rank or self._is_reported_elsewhere(failure):
            return AlreadyReported(str(failure), failure.exit_code)
        return error if failure == own else RankError(str(failure), failure.exit_code)

    def _fault_of_other(self, error: BaseException) -> RankFailure | None:
        """Return the failure of another rank that ``error`` follows from, or None."""
        if isinstance(error, RankError):
            # All ranks have learned which one failed, and that one publishes its error.
            is_published = self._until(lambda: self._call(lambda: self._store.check(["failure"]), False), _AGREED_S)
            return self._first_failure() if is_published else None
        return self._find_failed_rank() if _is_broken_connection(error) else None

    def _handle_agreed(self, error: PsannlmError) -> BaseException:
        """Handle an end that all ranks agreed on: rank 0 prints it when it is done."""
        if self.rank == 0:
            self._mark_reported()
            return error
        self._wait_until_reported(_AGREED_S)
        return AlreadyReported(str(error), error.exit_code)

    def _find_failed_rank(self) -> RankFailure | None:
        """Return, after a connection broke, the error of another rank, or the rank without heartbeats, or None."""
        before = self._heartbeats(range(self.size))
        silent = [rank for rank in before if rank != self.rank]
        for n_beats in range(1, _MOST_SEARCH_BEATS + 1):
            if (failure := self._first_failure()) is not None:
                return failure
            time.sleep(_BEAT_S)
            now = self._heartbeats(range(self.size))
            silent = [rank for rank in silent if before[rank] == now.get(rank) != _DONE]
            if n_beats >= _SEARCH_BEATS and len(silent) <= 1:
                break
        return self._publish(_dead(silent[0], self.rank)) if silent else None

    def _watch(self) -> None:
        watched = list(range(self.size) if self.rank == 0 else range(1))
        while not self._closed.wait(_BEAT_S):
            self._beat()
            failure = self._first_failure()
            if failure is None and not self._is_leaving.is_set():
                has_joined = self._has_joined.is_set()
                ranks = watched if has_joined else self._started(watched)
                beats = self._heartbeats(ranks)
                failure = self._silent_rank(ranks, beats) or (self._stalled_rank(beats) if has_joined else None)
            if failure is not None and not self._is_leaving.is_set():
                if self.rank == 0:
                    self._report(failure)
                if not self._is_leaving.wait(_GRACE_S):
                    self._exit(failure)

    def _started(self, ranks: Sequence[int]) -> list[int]:
        """Return the ranks with a heartbeat: reading that of another one would wait for it."""
        return [r for r in ranks if self._call(lambda key=f"alive/{r}": self._store.check([key]), False)]  # type: ignore[misc]

    def _silent_rank(self, ranks: Sequence[int], beats: Mapping[int, bytes]) -> RankFailure | None:
        for rank in ranks:
            is_silent = rank not in beats or beats[rank] == self._seen.get(rank) != _DONE
            self._silent[rank] = self._silent.get(rank, 0) + 1 if is_silent else 0
            if self._silent[rank] >= _SILENT_BEATS and rank != self.rank:
                return self._publish(_dead(rank, self.rank))
        self._seen.update(beats)
        return None

    def _stalled_rank(self, beats: Mapping[int, bytes]) -> RankFailure | None:
        """Log a rank that the others wait for; return the failure if they will wait forever. Only rank 0 sees all."""
        if self.rank != 0:
            return None
        texts = {rank: beat.partition(b" ")[2].decode("ascii", "replace") for rank, beat in beats.items()}
        stall = self._stalls.update(
            {rank: a for rank, text in texts.items() if (a := Activity.decode(text)) is not None}
        )
        if stall is None:
            return None
        if stall.is_deadlock:
            return self._publish(RankFailure(stall.rank, stall.message, EXIT_FAILED, self.rank))
        log.warning(f"note: rank {stall.rank} {stall.message}")
        return None

    def _exit(self, failure: RankFailure) -> None:
        """End the process from this thread: the main thread is blocked in a collective, which no exception ends."""
        if failure.by == self.rank != 0 and not self._is_reported_elsewhere(failure) and not self._is_leaving.is_set():
            self._report(failure)
        if not self._is_leaving.is_set():
            os._exit(failure.exit_code)

    def _report(self, failure: RankFailure) -> None:
        if not self._is_reported:
            self._is_reported = True
            # Not through the console of the command line: its thread is blocked. Show the hidden cursor again.
            if is_terminal(sys.stderr):
                sys.stderr.write("\x1b[?25h\n")
            print_error_line(f"error: {failure}")
        self._mark_reported()

    # Every use of the store goes through _call. A store that fails once means that rank 0 or the launcher has ended; it
    # is not used again.

    def _call(self, use: Callable[[], T], otherwise: T) -> T:
        with self._lock:
            if not self._is_store_lost:
                try:
                    return use()
                except RuntimeError:
                    self._is_store_lost = True
        return otherwise

    def _beat(self) -> None:
        self._beats += 1
        beat = f"{self._beats:012d} {self._main_thread.observe().encode()}"
        self._call(lambda: self._store.set(f"alive/{self.rank}", beat), None)

    def _heartbeats(self, ranks: Sequence[int]) -> dict[int, bytes]:
        keys = [f"alive/{rank}" for rank in ranks]
        found: list[bytes] = []
        found = self._call(lambda: self._store.multi_get(keys), found)
        return dict(zip(ranks, found, strict=False))

    def _mark_reported(self) -> None:
        self._call(lambda: self._store.set("reported", "yes"), None)

    def _is_reported_elsewhere(self, failure: RankFailure) -> bool:
        """Wait for rank 0 to print ``failure``, unless it is the one that is dead; return whether it did."""
        return not (failure.is_dead and failure.rank == 0) and self._wait_until_reported(_REPORT_S)

    def _wait_until_reported(self, within_s: float) -> bool:
        return self._until(lambda: self._call(lambda: self._store.check(["reported"]), False), within_s)

    def _until(self, condition: Callable[[], bool], within_s: float) -> bool:
        deadline = time.monotonic() + within_s
        while not condition():
            if self._is_store_lost or time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _first_failure(self) -> RankFailure | None:
        if self._failure is not None:
            return self._failure
        if self._is_store_lost:
            return _dead(0, self.rank)
        if not self._call(lambda: self._store.check(["failure"]), False):
            return None
        return self._known(self._call(lambda: self._store.get("failure"), b""))

    def _publish(self, failure: RankFailure) -> RankFailure:
        """Record ``failure`` if it is the first of the group; return the first."""
        text = json.dumps(asdict(failure))
        return self._known(self._call(lambda: self._store.compare_set("failure", "", text), b"")) or failure

    def _known(self, text: bytes) -> RankFailure | None:
        if not text:
            return None
        if self._failure is None:
            self._failure = RankFailure(**json.loads(text))
            if self.rank != 0:
                self._call(lambda: self._store.add("informed", 1), 0)
        return self._failure


def _dead(rank: int, seen_by: int) -> RankFailure:
    """Return the failure of a rank that no longer responds."""
    message = f"gone: it was killed, or its machine or network failed (noticed by rank {seen_by})"
    return RankFailure(rank, message, EXIT_FAILED, seen_by)


def _is_broken_connection(error: BaseException) -> bool:
    """Whether a collective failed because of another rank: nccl raises its own class, gloo is known by its message."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search("gloo|connection|socket|peer", str(error), re.IGNORECASE))

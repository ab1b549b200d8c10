"""Ranks that tell each other that they live and why they fail, so that none waits for one that will never come.

A collective operation has no way out: when a rank fails, the others stand in it until a time limit of half an hour. So
every rank keeps a thread that, through the key-value store the group met in, hears the first error of any rank and the
heartbeats of the others. Rank 0 tells the error; all end.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol, TypeVar

import torch.distributed as dist

from psannlm.errors import EXIT_FAILED, AlreadyTold, Interrupted, PsannlmError, RankError, describe
from psannlm.runtime.streams import is_terminal, say

T = TypeVar("T")

# A rank counts as gone after so many beats without a sign of it: counted in beats of the one who listens, because a
# clock would go on while the whole job is suspended.
_BEAT_S = 1.0
_SILENT_BEATS = 18
# After an error elsewhere the main thread may find out by itself, in a collective that breaks, and clean up.
_GRACE_S = 3.0
# How long a rank with an error waits for rank 0 to tell it, before it does so itself.
_HEARD_S = 8.0
# How long rank 0 may take for its last words (the loss curve) after an end that all ranks agreed on.
_AGREED_S = 60.0
# Set in ranks whose launcher tells by itself which of them was killed.
LAUNCHED = "PSANNLM_LAUNCHED"
# A broken connection is known before it is known whose.
_SEARCH_BEATS = 5


@dataclass(frozen=True)
class Word:
    """The first error of a group: the rank it happened on, what it was, the exit code to end with, and who says so."""

    rank: int
    message: str
    exit_code: int
    by: int

    @property
    def is_gone(self) -> bool:
        """Whether the rank itself cannot say anything any more."""
        return self.rank != self.by

    def __str__(self) -> str:
        return self.message if self.by == self.rank == 0 else f"rank {self.rank}: {self.message}"


class Store(Protocol):
    """What is used of the key-value store of a group; any of it raises RuntimeError when the store is gone."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def multi_get(self, keys: list[str]) -> list[bytes]: ...

    def check(self, keys: list[str]) -> bool: ...

    def add(self, key: str, amount: int) -> int: ...

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes: ...


class Lifeline:
    """Holds this rank's thread between :meth:`start` and :meth:`close`; ``store`` is one all ranks see."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self.rank, self.size = store, rank, size
        self._lock = threading.Lock()
        self._is_told = False
        self._is_cut = False
        self._word: Word | None = None
        self._leaving, self._closed = threading.Event(), threading.Event()
        self._beats = 0
        self._seen: dict[int, bytes] = {}
        self._silent: dict[int, int] = {}
        self._thread = threading.Thread(target=self._listen, name="lifeline", daemon=True)
        self._beat()

    def start(self) -> None:
        """Begin to listen; every rank must have been made by then."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._leaving.set()
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=_HEARD_S)

    def last_word(self, error: BaseException) -> BaseException:
        """Return what the main thread shall end with because of ``error``: the first error of all, told once.

        An ``AlreadyTold`` where another rank tells it, a ``RankError`` on rank 0 where it happened elsewhere.
        """
        self._leaving.set()
        if isinstance(error, Interrupted):
            return self._accepted_tokens(error)
        own = Word(self.rank, describe(error), getattr(error, "exit_code", EXIT_FAILED), self.rank)
        fault = self._whose_fault() if _is_broken_connection(error) else None
        word = fault or self._publish(own)
        if self.rank == 0:
            was_told, self._is_told = self._is_told, True
            was_told |= fault is not None and fault.is_gone and LAUNCHED in os.environ
            self._mark_heard()
            # The store may live in this process.
            self._until(lambda: self._call(lambda: self._store.add("knowing", 0), self.size) >= self.size - 1, _GRACE_S)
            if was_told:
                return AlreadyTold(str(word), word.exit_code)
            # An error that all ranks have is rank 0's own.
            return error if word.message == own.message else RankError(str(word), word.exit_code)
        if word.by != self.rank or self._is_heard(_HEARD_S):
            return AlreadyTold(str(word), word.exit_code)
        return error if word == own else RankError(str(word), word.exit_code)

    def _accepted_tokens(self, error: PsannlmError) -> BaseException:
        """All ranks end like this, and rank 0 says so when it is done."""
        if self.rank == 0:
            self._mark_heard()
            return error
        self._is_heard(_AGREED_S)
        return AlreadyTold(str(error), error.exit_code)

    def _whose_fault(self) -> Word | None:
        """After a connection broke: the error of another rank, else the rank that has stopped to beat, if one has."""
        before = self._hearts(range(self.size))
        for _ in range(_SEARCH_BEATS):
            if (word := self._first_word()) is not None:
                return word
            time.sleep(_BEAT_S)
        after = self._hearts(range(self.size))
        gone = [rank for rank in before if rank != self.rank and before[rank] == after.get(rank)]
        return self._publish(_gone(gone[0], self.rank)) if gone else None

    def _listen(self) -> None:
        watched = range(self.size) if self.rank == 0 else range(1)
        while not self._closed.wait(_BEAT_S):
            self._beat()
            word = self._first_word()
            if word is None and not self._leaving.is_set():
                word = self._silent_rank(watched)
            if word is not None and not self._leaving.is_set():
                if self.rank == 0:
                    self._tell(word)
                if not self._leaving.wait(_GRACE_S):
                    self._end(word)

    def _silent_rank(self, watched: range) -> Word | None:
        hearts = self._hearts(watched)
        for rank in watched:
            is_silent = rank not in hearts or hearts[rank] == self._seen.get(rank)
            self._silent[rank] = self._silent.get(rank, 0) + 1 if is_silent else 0
            if self._silent[rank] >= _SILENT_BEATS and rank != self.rank:
                return self._publish(_gone(rank, self.rank))
        self._seen.update(hearts)
        return None

    def _end(self, word: Word) -> None:
        """End the process from the thread: the main one stands in a collective, where no exception reaches it."""
        if word.by == self.rank != 0 and not self._is_heard(_HEARD_S) and not self._leaving.is_set():
            self._tell(word)
        if not self._leaving.is_set():
            os._exit(word.exit_code)

    def _tell(self, word: Word) -> None:
        if not self._is_told:
            self._is_told = True
            # Not through the command line's console: its thread will not come back. A live line has hidden the cursor.
            if is_terminal(sys.stderr):
                sys.stderr.write("\x1b[?25h\n")
            say(f"error: {word}")
        self._mark_heard()

    # Every use of the store goes through _call: one that does not answer is the end of rank 0 or of the launcher, and
    # is not asked again.

    def _call(self, use: Callable[[], T], otherwise: T) -> T:
        with self._lock:
            if not self._is_cut:
                try:
                    return use()
                except RuntimeError:
                    self._is_cut = True
        return otherwise

    def _beat(self) -> None:
        self._beats += 1
        self._call(lambda: self._store.set(f"alive/{self.rank}", f"{self._beats:012d}"), None)

    def _hearts(self, ranks: range) -> dict[int, bytes]:
        keys = [f"alive/{rank}" for rank in ranks]
        found: list[bytes] = []
        found = self._call(lambda: self._store.multi_get(keys), found)
        return dict(zip(ranks, found, strict=False))

    def _mark_heard(self) -> None:
        self._call(lambda: self._store.set("heard", "yes"), None)

    def _is_heard(self, within_s: float) -> bool:
        return self._until(lambda: self._call(lambda: self._store.check(["heard"]), False), within_s)

    def _until(self, is_so: Callable[[], bool], within_s: float) -> bool:
        deadline = time.monotonic() + within_s
        while not is_so():
            if self._is_cut or time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _first_word(self) -> Word | None:
        if self._word is not None:
            return self._word
        if self._is_cut:
            return _gone(0, self.rank)
        if not self._call(lambda: self._store.check(["word"]), False):
            return None
        return self._known(self._call(lambda: self._store.get("word"), b""))

    def _publish(self, word: Word) -> Word:
        """Say ``word`` if it is the first, and return the first."""
        text = json.dumps(asdict(word))
        return self._known(self._call(lambda: self._store.compare_set("word", "", text), b"")) or word

    def _known(self, text: bytes) -> Word | None:
        if not text:
            return None
        if self._word is None:
            self._word = Word(**json.loads(text))
            if self.rank != 0:
                self._call(lambda: self._store.add("knowing", 1), 0)
        return self._word


def _gone(rank: int, seen_by: int) -> Word:
    message = f"gone: it was killed, or its machine or network failed (noticed by rank {seen_by})"
    return Word(rank, message, EXIT_FAILED, seen_by)


def _is_broken_connection(error: BaseException) -> bool:
    """Whether a collective failed because of another rank: nccl has a class for it, gloo words."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search("gloo|connection|socket|peer", str(error), re.IGNORECASE))

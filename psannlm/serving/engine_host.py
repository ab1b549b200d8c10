"""The engine's side of the server: a thread that computes, and the connection to the HTTP process."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe, wait
from types import FrameType
from typing import Any

from psannlm.errors import GenerationError
from psannlm.io.limits import describe_memory, machine_memory_bytes
from psannlm.models.accounting import cache_bytes
from psannlm.models.kv_cache import MAX_DECODE_TOKENS
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import gpu_memory_bytes
from psannlm.serving.limits import DRAIN_TIMEOUT_S
from psannlm.serving.messages import Counters, GenerationRequest, Update
from psannlm.serving.scheduler import PREFILL_CHUNK_TOKENS, Handle, Scheduler

log = logging.getLogger(__name__)

_IDLE_S = 0.5
# Seconds that a thread that still prepares the engine gets to end; compiling takes up to a minute.
_PREPARE_END_S = 2.0


def refuse_oversize(model: Transformer, max_batch: int, bytes_per_element: int) -> None:
    """Raise GenerationError where the cache of ``max_batch`` rows at full context cannot fit into memory."""
    config = model.config
    n_tokens = (config.max_seq_len or 0) + MAX_DECODE_TOKENS
    cache = cache_bytes(config, max_batch + 1, n_tokens, bytes_per_element)
    logits = 4 * max(max_batch, PREFILL_CHUNK_TOKENS) * (config.vocab_size or 0)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    device = model.embedding.weight.device
    memory = gpu_memory_bytes(device) if device.type == "cuda" else machine_memory_bytes()
    needed = cache + logits + 2 * weights
    if memory is not None and needed > memory:
        has = f"the GPU has {memory / 1e9:,.1f} GB" if device.type == "cuda" else describe_memory()
        raise GenerationError(
            f"{max_batch:,} rows of {config.max_seq_len:,} tokens need {needed / 1e9:,.1f} GB with the weights, and "
            f"{has}; lower --max-batch, or serve with --dtype bfloat16"
        )


class EngineThread:
    """Thread that owns the model.

    Args:
        prepare: makes the scheduler, in the thread, which may take a minute where steps are compiled.
        on_ready: called in the thread once ``scheduler`` is set.
        on_failure: called in the thread when it ends with an error, which is then in ``failure``.

    Attributes:
        scheduler: None while the engine is prepared.
        failure: the error that ended the thread.
    """

    def __init__(
        self, prepare: Callable[[], Scheduler], on_ready: Callable[[], None], on_failure: Callable[[], None]
    ) -> None:
        self._prepare, self._on_ready, self._on_failure = prepare, on_ready, on_failure
        self.scheduler: Scheduler | None = None
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._is_cut_off = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def cut_off(self) -> None:
        """End all requests with an error after the step that is computed."""
        self._is_cut_off = True
        if self.scheduler is not None:
            self.scheduler.cancel([])

    def stop(self) -> bool:
        """End the thread after its step, and return whether it ended: one that prepares cannot be interrupted."""
        self._stop.set()
        if self.scheduler is None:
            self._thread.join(_PREPARE_END_S)
        if self.scheduler is not None:
            self.scheduler.cancel([])
            self._thread.join()
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.scheduler = scheduler = self._prepare()
            self._on_ready()
            while not self._stop.is_set():
                if self._is_cut_off:
                    scheduler.fail_all(GenerationError("the server is ending"))
                if not scheduler.has_work:
                    scheduler.wait_for_work(_IDLE_S)
                    continue
                try:
                    scheduler.step()
                except GenerationError as error:
                    # Logits that are not finite: these sequences have no result; others may.
                    scheduler.fail_all(error)
        except BaseException as error:  # noqa: BLE001, the main thread raises it
            self.failure = error
            if self.scheduler is not None:
                self.scheduler.fail_all(GenerationError("the server has failed"))
            self._on_failure()


class EngineHost:
    """The engine's side of the connection to the HTTP process (:class:`psannlm.serving.engine_client.EngineClient`).

    Args:
        prepare: makes the scheduler.
        connection: to the HTTP process; when that process closes it, :meth:`run` returns.
        on_ready: called once requests are taken.
    """

    def __init__(self, prepare: Callable[[], Scheduler], connection: Connection, on_ready: Callable[[], None]) -> None:
        self._engine = EngineThread(prepare, lambda: self._send("ready"), lambda: self._send("end"))
        self._connection, self._sending = connection, threading.Lock()
        self._on_ready = on_ready
        # Handles of the open sequences, by the numbers that the HTTP process gave them.
        self._open: dict[int, Handle | None] = {}
        self._opening = threading.Lock()
        self._updates: list[tuple[int, Update]] = []
        # Signals write into it, so that the thread that reads the connection sends what follows from them.
        self._signalled, self._signals = Pipe(duplex=False)

    def run(self) -> bool:
        """Serve until the HTTP process ends.

        The first SIGTERM or SIGINT refuses new requests and ends once the open ones have ended, a second SIGINT cuts
        them off. Only in the main thread; elsewhere :meth:`drain` does it.

        Returns:
            Whether a thread is left, which still prepares the engine: nothing can interrupt it.

        Raises:
            Exception: what ended the engine.
        """
        self._engine.start()
        with self._handling_signals():
            while (message := self._receive()) is not None:
                self._take(*message)
        is_left = not self._engine.stop()
        self._signalled.close()
        self._signals.close()
        if self._engine.failure is not None:
            raise self._engine.failure
        return is_left

    def _receive(self) -> tuple[str, Any] | None:
        """Return the next message of a signal or of the HTTP process, or None once that process has ended."""
        try:
            ready = wait([self._connection, self._signalled])
            connection = self._signalled if self._signalled in ready else self._connection
            message: tuple[str, Any] = connection.recv()
        except (EOFError, OSError):
            # OSError: it ended in the middle of a message.
            return None
        return message

    def drain(self) -> None:
        """Refuse new requests, and end once the open ones have ended or their time is over."""
        self._signals.send(("drain", None))

    def cut_off(self) -> None:
        """End a drain at once: open requests end with an error."""
        self._signals.send(("end_drain", None))

    @contextmanager
    def _handling_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        n_signals = 0

        def note(number: int, frame: FrameType | None) -> None:
            nonlocal n_signals
            n_signals += 1
            if n_signals == 1:
                self.drain()
            elif number == signal.SIGINT:
                self.cut_off()

        former = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _take(self, kind: str, content: Any) -> None:
        """Act on a message of the HTTP process, or on a signal."""
        scheduler = self._engine.scheduler
        if kind == "submit":
            assert scheduler is not None
            self._submit(scheduler, content)
        elif kind == "cancel":
            assert scheduler is not None
            scheduler.cancel([handle for number in content if (handle := self._open.pop(number, None)) is not None])
        elif kind == "counters":
            self._send(kind, Counters() if scheduler is None else scheduler.counters)
        elif kind == "cut_off":
            self._engine.cut_off()
        elif kind == "serving":
            self._on_ready()
        elif kind == "log":
            log.log(*content)
        elif kind == "drain":
            if scheduler is not None and scheduler.has_work:
                log.info(f"ending: open requests have {DRAIN_TIMEOUT_S:g} s; press Ctrl-C again to cut them off")
            self._send("drain")
        else:
            self._send(kind)

    def _submit(self, scheduler: Scheduler, numbered: Sequence[tuple[int, GenerationRequest]]) -> None:
        numbers = [number for number, _ in numbered]
        # Before they are submitted: the engine's thread may end one at once.
        self._open.update(dict.fromkeys(numbers))
        handles = scheduler.submit(
            [request for _, request in numbered],
            lambda index, update: self._note(numbers[index], update),
            self._send_updates,
        )
        with self._opening:
            self._open.update({n: handle for n, handle in zip(numbers, handles, strict=True) if n in self._open})

    def _note(self, number: int, update: Update) -> None:
        if update.is_last:
            with self._opening:
                self._open.pop(number, None)
        self._updates.append((number, update))

    def _send_updates(self) -> None:
        updates, self._updates = self._updates, []
        self._send("updates", updates)

    def _send(self, kind: str, content: Any = None) -> None:
        try:
            with self._sending:
                self._connection.send((kind, content))
        except OSError:
            # The HTTP process has ended, which the thread that reads finds out too.
            pass

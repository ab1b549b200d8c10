"""Thread that owns the model: it prepares the engine, then drives the scheduler step by step."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from psannlm.errors import GenerationError
from psannlm.serving.scheduler import Scheduler

log = logging.getLogger(__name__)

_IDLE_S = 0.5
# Seconds that a thread that still prepares the engine gets to end; compiling takes up to a minute.
_PREPARE_END_S = 2.0


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

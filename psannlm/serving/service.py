"""What the routes of the server share."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from psannlm.serving.engine_client import EngineClient
from psannlm.serving.errors import RequestError
from psannlm.serving.inbox import Inbox
from psannlm.serving.metrics import Metrics
from psannlm.tokenizers.base import Tokenizer


@dataclass
class Service:
    """What the routes need.

    Attributes:
        model: name of the model.
        tokenizer: of the model.
        context: most tokens of a sequence, prompt included.
        max_tokens: most new tokens of a sequence.
        engine: the process that computes.
        metrics: what ``/metrics`` shows, or None where it is not served.
        has_page: whether ``/`` is the page.
        is_draining: whether new requests are refused, because the server ends.
        created: when the server started, in seconds since 1970.
    """

    model: str
    tokenizer: Tokenizer
    context: int
    max_tokens: int
    engine: EngineClient
    metrics: Metrics | None = None
    has_page: bool = True
    is_draining: bool = False
    created: int = 0
    _inbox: Inbox | None = None
    _n_preparing: int = 0

    def inbox_of(self, loop: asyncio.AbstractEventLoop) -> Inbox:
        """Return the inbox of the event loop that serves."""
        if self._inbox is None or self._inbox.loop is not loop:
            self._inbox = Inbox(loop)
        return self._inbox

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Hold a place for a request while its body is read and its prompts are encoded, which costs memory and time.

        Raises:
            RequestError: the open sequences and the requests that are prepared fill the queue.
        """
        if self.engine.n_open + self._n_preparing >= self.engine.max_open:
            raise self.busy("no place is left in the queue; try again later")
        self._n_preparing += 1
        try:
            yield
        finally:
            self._n_preparing -= 1

    def busy(self, why: str) -> RequestError:
        """Return the error of a request for which there is no place."""
        headers = {"Retry-After": str(self.engine.expected_wait_s())}
        return RequestError(429, f"the server is busy: {why}", code="queue_full", headers=headers)

    def ready(self) -> EngineClient:
        """Return the engine. Raises RequestError while the server starts or ends."""
        if self.is_draining:
            raise RequestError(503, "the server is ending", code="shutting_down", headers={"Connection": "close"})
        if not self.engine.is_ready:
            raise RequestError(503, "the model is loading", code="loading", headers={"Retry-After": "5"})
        return self.engine

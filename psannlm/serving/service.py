"""What the routes of the server share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from psannlm.serving.errors import RequestError
from psannlm.serving.inbox import Inbox
from psannlm.serving.metrics import Metrics
from psannlm.serving.scheduler import Scheduler
from psannlm.tokenizers.base import Tokenizer


@dataclass
class Service:
    """What the routes need.

    Attributes:
        model: name of the model.
        tokenizer: of the model.
        context: most tokens of a sequence, prompt included.
        max_tokens: most new tokens of a sequence.
        scheduler: returns the scheduler, or None while the model is prepared.
        metrics: what ``/metrics`` shows, or None where it is not served.
        has_page: whether ``/`` is the page.
        is_draining: whether new requests are refused, because the server ends.
        created: when the server started, in seconds since 1970.
    """

    model: str
    tokenizer: Tokenizer
    context: int
    max_tokens: int
    scheduler: Callable[[], Scheduler | None]
    metrics: Metrics | None = None
    has_page: bool = True
    is_draining: bool = False
    created: int = 0
    _inbox: Inbox | None = None

    def inbox_of(self, loop: asyncio.AbstractEventLoop) -> Inbox:
        """Return the inbox of the event loop that serves."""
        if self._inbox is None or self._inbox.loop is not loop:
            self._inbox = Inbox(loop)
        return self._inbox

    def ready(self) -> Scheduler:
        """Return the scheduler. Raises RequestError while the server starts or ends."""
        scheduler = self.scheduler()
        if self.is_draining:
            raise RequestError(503, "the server is ending", code="shutting_down", headers={"Connection": "close"})
        if scheduler is None:
            raise RequestError(503, "the model is loading", code="loading", headers={"Retry-After": "5"})
        return scheduler

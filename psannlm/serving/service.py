"""What the routes of the server share."""

from __future__ import annotations

import asyncio
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

    def inbox_of(self, loop: asyncio.AbstractEventLoop) -> Inbox:
        """Return the inbox of the event loop that serves."""
        if self._inbox is None or self._inbox.loop is not loop:
            self._inbox = Inbox(loop)
        return self._inbox

    def ready(self) -> EngineClient:
        """Return the engine. Raises RequestError while the server starts or ends."""
        if self.is_draining:
            raise RequestError(503, "the server is ending", code="shutting_down", headers={"Connection": "close"})
        if not self.engine.is_ready:
            raise RequestError(503, "the model is loading", code="loading", headers={"Retry-After": "5"})
        return self.engine

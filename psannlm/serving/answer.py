"""Answers to completion requests: whole, or as events while they grow."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from psannlm.errors import GenerationError
from psannlm.serving.choices import Choice, joined, usage
from psannlm.serving.engine_client import EngineClient, QueueFullError
from psannlm.serving.errors import RequestError
from psannlm.serving.events import Pings, while_connected
from psannlm.serving.guard import Receive
from psannlm.serving.messages import Update
from psannlm.serving.protocol import CompletionRequest, Prompt, generation_requests
from psannlm.serving.service import Service

# JSON of one line, as an event needs it; json.dumps would make an encoder for every event.
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Answer:
    """Answer to one completion request: its choices, as their updates come from the engine."""

    def __init__(self, service: Service, request: CompletionRequest, prompts: Sequence[Prompt]) -> None:
        self._service, self._request, self._prompts = service, request, prompts
        self._choices = [
            Choice(at * request.n + choice, request, prompt, service.tokenizer)
            for at, prompt in enumerate(prompts)
            for choice in range(request.n)
        ]
        # None in place of an update: nothing has happened for some time, and the client shall see that this lives.
        self._updates: asyncio.Queue[tuple[int, Update] | None] = asyncio.Queue()
        self._sequences: list[int] = []
        self._engine: EngineClient | None = None
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model,
        }
        self._began = time.monotonic()
        self._has_first = False

    def submit(self) -> None:
        """Queue the sequences. Raises RequestError where they are refused."""
        inbox = self._service.inbox_of(asyncio.get_running_loop())

        def on_update(number: int, update: Update) -> None:
            inbox.put(self._updates, (number, update))

        self._engine = engine = self._service.ready()
        requests = generation_requests(self._request, list(self._prompts))
        n_most = engine.max_open
        if len(requests) > n_most:
            message = f"{len(requests)} choices are more than the {n_most} that this server holds; ask for fewer"
            raise RequestError(400, message, param="n" if self._request.n > 1 else "prompt", code="invalid_value")
        try:
            self._sequences = engine.submit(requests, on_update, inbox.deliver)
        except QueueFullError as error:
            raise self._service.busy(str(error)) from error
        except GenerationError as error:
            raise RequestError(400, str(error), param="prompt", code="invalid_value") from error

    async def _parts(self) -> AsyncIterator[dict[str, Any] | None]:
        """Yield the parts of the choices until all have ended; cancels them where the reader goes away.

        None is yielded for None among the updates.
        """
        assert self._engine is not None
        n_open = len(self._choices)
        try:
            while n_open:
                if (found := await self._updates.get()) is None:
                    yield None
                    continue
                number, update = found
                if update.error is not None:
                    raise RequestError(500, f"generation failed: {update.error}", code="generation_failed")
                self._note(update)
                n_open -= update.is_last
                part = self._choices[number].part(update)
                if part is not None:
                    yield part
        finally:
            if n_open:
                self._engine.cancel(self._sequences)

    def _note(self, update: Update) -> None:
        metrics = self._service.metrics
        if metrics is not None and update.ids and not self._has_first:
            metrics.first_token_s.observe(time.monotonic() - self._began)
        self._has_first = self._has_first or bool(update.ids)

    def _end(self, status: int) -> None:
        metrics = self._service.metrics
        if metrics is not None:
            metrics.count_request(status)
            metrics.request_s.observe(time.monotonic() - self._began)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the parts as events, then the usage where it is asked for, then ``[DONE]``."""
        # All but the part is the same in every event: it is encoded once.
        before = f'data: {_to_json(self._head)[:-1]},"choices":['
        after = ',"usage":null}\n\n' if self._request.includes_usage else "}\n\n"
        pings = Pings(self._updates)
        try:
            async for part in self._parts():
                pings.n_events += 1
                yield b": ping\n\n" if part is None else f"{before}{_to_json(part)}]{after}".encode()
        except RequestError as error:
            self._end(error.status)
            yield _event(error.body())
            return
        finally:
            pings.stop()
        if self._request.includes_usage:
            yield _event({**self._head, "choices": [], "usage": usage(self._prompts, self._choices)})
        yield b"data: [DONE]\n\n"
        self._end(200)

    async def whole(self, receive: Receive) -> dict[str, Any]:
        """Return the whole answer; the sequences are cancelled where the client goes away."""
        return await while_connected(self._gather(), receive)

    async def _gather(self) -> dict[str, Any]:
        parts: list[list[dict[str, Any]]] = [[] for _ in self._choices]
        async for part in self._parts():
            if part is not None:
                parts[part["index"]].append(part)
        self._end(200)
        choices = [joined(of_choice) for of_choice in parts]
        return {**self._head, "choices": choices, "usage": usage(self._prompts, self._choices)}


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {_to_json(content)}\n\n".encode()

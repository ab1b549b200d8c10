"""HTTP application: completions, models, health, metrics and the page."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from psannlm.errors import GenerationError
from psannlm.serving.choices import Choice, joined, usage
from psannlm.serving.errors import RequestError
from psannlm.serving.guard import App, Guard, HostRule, Scope
from psannlm.serving.inbox import Inbox
from psannlm.serving.limits import BODY_TIMEOUT_S, MAX_BODY_BYTES, PING_S
from psannlm.serving.metrics import Metrics
from psannlm.serving.page import load_page
from psannlm.serving.protocol import CompletionRequest, Prompt, generation_requests, parse_completion, read_prompts
from psannlm.serving.scheduler import Handle, QueueFullError, Scheduler, Update
from psannlm.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)

# JSON of one line, as an event needs it; json.dumps would make an encoder for every event.
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

_CHAT = (
    "this server has base models, which continue a text and were trained on no dialogs; send the text to "
    "/v1/completions"
)
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}


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


def build_app(service: Service, host_rule: HostRule, key: str | None = None) -> App:
    """Return the ASGI application of a service; with a ``key`` every route but ``/health`` needs it."""
    routes = [
        Route("/health", _route(service, health), methods=["GET"]),
        Route("/v1/models", _route(service, list_models), methods=["GET"]),
        Route("/v1/models/{name:path}", _route(service, show_model), methods=["GET"]),
        Route("/v1/completions", _route(service, complete), methods=["POST"]),
        Route("/v1/chat/completions", _route(service, refuse_chat), methods=["GET", "POST"]),
    ]
    if service.metrics is not None:
        routes.append(Route("/metrics", _route(service, show_metrics), methods=["GET"]))
    if service.has_page:
        routes.append(Route("/", _route(service, show_page), methods=["GET"]))
    app = Starlette(routes=routes, exception_handlers={HTTPException: _unrouted})
    app.router.redirect_slashes = False
    return Guard(app, host_rule, key, partial(_refusal, service))


def error_response(error: RequestError) -> Response:
    """Return the answer to a refused request."""
    return JSONResponse(error.body(), error.status, headers={**_HEADERS, **error.headers})


def _refusal(service: Service, error: RequestError, scope: Scope) -> Response:
    """Return the answer to a request that the guard refuses.

    A browser that opens the page cannot send a key: it gets the page, with the status of the refusal. The page asks for
    the key and sends it with its own requests; it is the same for everybody and says nothing of the model.
    """
    if error.status == 401 and service.has_page and scope["path"] == "/" and scope["method"] == "GET":
        page = load_page()
        return Response(page.content, error.status, headers={**page.headers, **error.headers})
    return error_response(error)


async def _unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    allowed = (error.headers or {}).get("Allow", "another method")
    what = {404: _missing_route(request.url.path), 405: f"{request.url.path} takes {allowed}, not {request.method}"}
    return error_response(
        RequestError(status, what.get(status, error.detail), code="not_found", headers=dict(error.headers or {}))
    )


def _missing_route(path: str) -> str:
    if path == "/metrics":
        return "there are no metrics; start the server with --metrics"
    return f"there is no {path:.100}; completions are at /v1/completions, so that the base URL of a client ends in /v1"


def _route(service: Service, answer: Callable[[Service, Request], Any]) -> Callable[[Request], Any]:
    async def run(request: Request) -> Response:
        try:
            response: Response = await answer(service, request)
        except RequestError as error:
            if service.metrics is not None and request.url.path == "/v1/completions":
                service.metrics.count_request(error.status)
            return error_response(error)
        except ClientDisconnect:
            return Response(status_code=400)
        except Exception as error:  # noqa: BLE001, a defect: the client gets an answer, the log its kind and place
            log.error(f"a request failed: {describe_defect(error)}")
            return error_response(RequestError(500, "the server has a defect; its log says more", code="defect"))
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    return run


def describe_defect(error: Exception) -> str:
    """Return the class of an error and the line it was raised in, but not its message: it may quote a prompt."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {last.filename}, line {last.lineno}"


async def health(service: Service, request: Request) -> Response:
    """Answer 200 when requests are taken, else 503."""
    service.ready()
    return JSONResponse({"status": "ok"})


def _model_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "psannlm",
        "max_model_len": service.context,
        "max_completion_tokens": service.max_tokens,
    }


async def list_models(service: Service, request: Request) -> Response:
    """List the one model."""
    return JSONResponse({"object": "list", "data": [_model_card(service)]})


async def show_model(service: Service, request: Request) -> Response:
    """Describe the model."""
    if request.path_params["name"] != service.model:
        raise RequestError(404, f"the model is {service.model!r}", param="model", code="model_not_found")
    return JSONResponse(_model_card(service))


async def refuse_chat(service: Service, request: Request) -> Response:
    """Say why there are no chats."""
    raise RequestError(404, _CHAT, code="base_model")


async def show_metrics(service: Service, request: Request) -> Response:
    """Return the metrics in Prometheus' text format."""
    assert service.metrics is not None
    content, kind = service.metrics.render(service.scheduler())
    return Response(content, media_type=kind)


async def show_page(service: Service, request: Request) -> Response:
    """Return the page."""
    page = load_page()
    return Response(page.content, headers=page.headers)


async def _read_body(request: Request) -> bytes:
    """Return a JSON body of bounded size, read in bounded time."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            415,
            "the Content-Type is not application/json; send the header Content-Type: application/json",
            code="unsupported_media_type",
        )
    body = bytearray()

    async def read() -> None:
        async for part in request.stream():
            body.extend(part)
            if len(body) > MAX_BODY_BYTES:
                raise RequestError(413, f"the body is larger than {MAX_BODY_BYTES >> 20} MiB", code="body_too_large")

    try:
        await asyncio.wait_for(read(), BODY_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise RequestError(408, f"the body did not arrive within {BODY_TIMEOUT_S:g} s", code="timeout") from None
    return bytes(body)


async def complete(service: Service, http: Request) -> Response:
    """Generate the choices of a completion request, as one answer or as a stream."""
    service.ready()
    body = await _read_body(http)
    request = parse_completion(body, service.model, service.max_tokens)
    # A long prompt takes long to encode: other requests shall not wait.
    prompts = await asyncio.to_thread(read_prompts, request, service.tokenizer)
    answer = Answer(service, request, prompts)
    answer.submit()
    if request.stream:
        return EventSourceResponse(answer.events(), ping=PING_S, headers={"X-Accel-Buffering": "no"}, sep="\n")
    return JSONResponse(await answer.whole(http))


class Answer:
    """Answer to one completion request: its choices, as their updates come from the scheduler."""

    def __init__(self, service: Service, request: CompletionRequest, prompts: Sequence[Prompt]) -> None:
        self._service, self._request, self._prompts = service, request, prompts
        self._choices = [
            Choice(at * request.n + choice, request, prompt, service.tokenizer)
            for at, prompt in enumerate(prompts)
            for choice in range(request.n)
        ]
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._handles: list[Handle] = []
        self._scheduler: Scheduler | None = None
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

        self._scheduler = scheduler = self._service.ready()
        requests = generation_requests(self._request, list(self._prompts))
        n_most = scheduler.max_batch + scheduler.max_queue
        if len(requests) > n_most:
            message = f"{len(requests)} choices are more than the {n_most} that this server holds; ask for fewer"
            raise RequestError(400, message, param="n" if self._request.n > 1 else "prompt", code="invalid_value")
        try:
            self._handles = scheduler.submit(requests, on_update, inbox.deliver)
        except QueueFullError as error:
            wait_s = scheduler.expected_wait_s()
            raise RequestError(
                429, f"the server is busy: {error}", code="queue_full", headers={"Retry-After": str(wait_s)}
            ) from error
        except GenerationError as error:
            raise RequestError(400, str(error), param="prompt", code="invalid_value") from error

    async def _parts(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the parts of the choices until all have ended; cancels them where the reader goes away."""
        assert self._scheduler is not None
        n_open = len(self._choices)
        try:
            while n_open:
                number, update = await self._updates.get()
                if update.error is not None:
                    raise RequestError(500, f"generation failed: {update.error}", code="generation_failed")
                self._note(update)
                n_open -= update.is_last
                part = self._choices[number].part(update)
                if part is not None:
                    yield part
        finally:
            if n_open:
                self._scheduler.cancel(self._handles)

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

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the parts as events, then the usage where it is asked for, then ``[DONE]``."""
        # All but the part is the same in every event: it is encoded once.
        before = f'data: {_to_json(self._head)[:-1]},"choices":['
        after = ',"usage":null}\n\n' if self._request.includes_usage else "}\n\n"
        try:
            async for part in self._parts():
                yield f"{before}{_to_json(part)}]{after}".encode()
        except RequestError as error:
            self._end(error.status)
            yield _event(error.body())
            return
        if self._request.includes_usage:
            yield _event({**self._head, "choices": [], "usage": usage(self._prompts, self._choices)})
        yield b"data: [DONE]\n\n"
        self._end(200)

    async def whole(self, http: Request) -> dict[str, Any]:
        """Return the whole answer; the sequences are cancelled where the client goes away."""
        gathering = asyncio.ensure_future(self._gather())
        leaving = asyncio.ensure_future(_disconnect(http))
        try:
            await asyncio.wait({gathering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not gathering.done():
                raise ClientDisconnect
            return gathering.result()
        finally:
            for task in (gathering, leaving):
                task.cancel()
            await asyncio.gather(gathering, leaving, return_exceptions=True)

    async def _gather(self) -> dict[str, Any]:
        parts: list[list[dict[str, Any]]] = [[] for _ in self._choices]
        async for part in self._parts():
            parts[part["index"]].append(part)
        self._end(200)
        choices = [joined(of_choice) for of_choice in parts]
        return {**self._head, "choices": choices, "usage": usage(self._prompts, self._choices)}


async def _disconnect(http: Request) -> None:
    """Return when the client is gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {_to_json(content)}\n\n".encode()

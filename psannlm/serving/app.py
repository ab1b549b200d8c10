"""HTTP application: completions, models, health, metrics and the page."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from psannlm.serving.answer import Answer
from psannlm.serving.errors import RequestError
from psannlm.serving.events import EventStream
from psannlm.serving.guard import App, Guard, HostRule, Scope
from psannlm.serving.limits import BODY_TIMEOUT_S, MAX_BODY_BYTES
from psannlm.serving.page import load_page
from psannlm.serving.protocol import parse_completion, read_prompts
from psannlm.serving.service import Service

log = logging.getLogger(__name__)

_CHAT = (
    "this server has base models, which continue a text and were trained on no dialogs; send the text to "
    "/v1/completions"
)
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}


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
    content, kind = service.metrics.render(await service.engine.counters())
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
    with service.preparing():
        body = await _read_body(http)
        request = parse_completion(body, service.model, service.max_tokens)
        # A long prompt takes long to encode: other requests shall not wait.
        prompts = await asyncio.to_thread(read_prompts, request, service.tokenizer)
        answer = Answer(service, request, prompts)
        answer.submit()
    if request.stream:
        return EventStream(answer.events())
    return JSONResponse(await answer.whole(http.receive))

"""Checks before any route: Host and Origin headers, API key, and the size of a body."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from psannlm.serving.errors import RequestError
from psannlm.serving.limits import MAX_BODY_BYTES

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
OPEN_ROUTES = ("/health",)


def is_loopback(host: str) -> bool:
    """Whether a host name or address to listen on is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class HostRule:
    """Which Host headers are ours: against DNS rebinding, where a foreign name leads a browser to this server.

    Args:
        host: what the server listens on.
        names: further names that lead to it, such as that of a proxy.
    """

    def __init__(self, host: str, names: tuple[str, ...] = ()) -> None:
        self._names = {name.lower().rstrip(".") for name in (*_LOOPBACK_NAMES, host, *names)}
        # An address cannot be rebound, since no name is looked up.
        self._takes_addresses = not is_loopback(host)

    def accepts(self, header: str) -> bool:
        """Whether a Host header, with or without a port, is one of ours."""
        try:
            name = (urlsplit(f"//{header}").hostname or "").rstrip(".")
            urlsplit(f"//{header}").port  # noqa: B018, raises ValueError
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self._takes_addresses


class Guard:
    """ASGI middleware that refuses requests before any route sees them.

    Args:
        app: gets the requests that pass.
        host_rule: which Host headers are ours.
        key: the API key; None: none is needed.
        answer: returns an ASGI answer for a request that is refused with an error.
    """

    def __init__(
        self, app: App, host_rule: HostRule, key: str | None, answer: Callable[[RequestError, Scope], App]
    ) -> None:
        self._app, self._hosts, self._answer = app, host_rule, answer
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except RequestError as error:
            await self._answer(error, scope)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in headers and name in (b"host", b"authorization", b"content-length", b"content-type"):
                raise RequestError(400, f"the header {name.decode('latin-1')} is given twice")
            headers[name] = value
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._hosts.accepts(host):
            raise RequestError(
                403,
                f"the Host header {host!r:.100} is not a name of this server; start it with --allowed-host to add one",
                code="host_not_allowed",
            )
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").partition("://")[2] != host:
            raise RequestError(403, "requests from pages of other sites are refused", code="origin_not_allowed")
        if self._key is not None and scope["path"] not in OPEN_ROUTES:
            self._check_key(headers.get(b"authorization", b""))
        self._check_length(headers.get(b"content-length"))

    def _check_key(self, given: bytes) -> None:
        """Take ``Bearer KEY`` alone: what a browser asks its user for, it sends for pages of other sites too."""
        assert self._key is not None
        scheme, _, value = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(value.strip(), self._key):
            raise RequestError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_length(self, given: bytes | None) -> None:
        if given is not None and (not given.isdigit() or int(given[:20]) > MAX_BODY_BYTES):
            raise RequestError(413, f"the body is larger than {MAX_BODY_BYTES >> 20} MiB", code="body_too_large")

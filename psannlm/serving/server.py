"""HTTP server: uvicorn with time limits, and the end on SIGTERM."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from psannlm.serving.app import build_app
from psannlm.serving.guard import HostRule
from psannlm.serving.limits import DRAIN_TIMEOUT_S, HEADER_TIMEOUT_S, KEEP_ALIVE_S, STALL_TIMEOUT_S
from psannlm.serving.service import Service

_DRAIN_CHECK_S = 0.05
# Seconds that the last events of requests that are cut off have to be sent.
_CUT_OFF_S = 2.0


class _TimedProtocol(H11Protocol):
    """HTTP/1.1 that drops a connection whose headers do not arrive, or whose answer is not read, in time.

    A request behind an open one (pipelining) ends the connection: uvicorn would stop reading it, and would not see that
    the client goes away.
    """

    _deadline: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_request()

    def data_received(self, data: bytes) -> None:
        if self.cycle is not None and not self.cycle.response_complete and self.conn.their_state is h11.DONE:
            # Some clients send an empty line after a body.
            if data.strip(b"\r\n"):
                self.transport.close()
            return
        # Of a connection that is kept alive, the next request has begun.
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._await_request()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(STALL_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._end_stall()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._end_stall()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._stop_waiting()
        super().on_response_complete()

    def _await_request(self) -> None:
        self._deadline = self.loop.call_later(HEADER_TIMEOUT_S, self._drop)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _drop(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn that drains on a signal; the engine's process, which got it too or did not, has the last word."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._drain()


class HttpServer:
    """The HTTP side of a server: uvicorn in the calling thread, and a thread that takes the engine's messages.

    Args:
        service: what the routes need, the engine among it.
        listening: from :func:`psannlm.serving.sockets.bind_socket`.
        key: the API key; None: none is needed.
    """

    def __init__(self, service: Service, listening: socket.socket, host_rule: HostRule, key: str | None) -> None:
        self._service, self._engine, self._listening = service, service.engine, listening
        config = uvicorn.Config(
            build_app(service, host_rule, key),
            http=_TimedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config, self._drain)
        self._drain_ends_s = float("inf")
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> None:
        """Serve until the engine's process asks for the end, or is gone."""
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        # One thread encodes prompts: each further one would keep memory of its own after the longest that it had.
        self._loop.set_default_executor(ThreadPoolExecutor(1, "encoding"))
        receiving = threading.Thread(
            target=self._engine.receive, args=(self._take,), name="engine messages", daemon=True
        )
        receiving.start()
        try:
            await self._server.serve(sockets=[self._listening])
        finally:
            # Before the loop is closed, which the thread wakes for every update.
            self._engine.close()
            receiving.join()

    def _take(self, kind: str) -> None:
        """Act on a message of the engine's process."""
        if kind == "ready":
            self._engine.report("serving")
        elif kind == "drain":
            self._drain()
        elif kind == "end_drain":
            self._end_drain()
        else:
            self._end()

    def _end(self) -> None:
        self._server.should_exit = True

    def _end_drain(self) -> None:
        self._drain_ends_s = 0.0

    def _drain(self) -> None:
        """Refuse new requests, and end once the open ones have ended or their time is over; for any thread."""
        if not self._service.is_draining:
            self._service.is_draining = True
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        self._draining = asyncio.ensure_future(self._wait_and_end())

    def _has_open_requests(self) -> bool:
        return self._engine.is_ready and bool(self._engine.has_work or self._server.server_state.tasks)

    async def _wait_and_end(self) -> None:
        began = asyncio.get_running_loop().time()
        self._drain_ends_s = min(self._drain_ends_s, DRAIN_TIMEOUT_S)
        await self._wait_for_requests(lambda: began + self._drain_ends_s)
        if self._has_open_requests():
            # Their streams end with an error instead of a lost connection.
            self._engine.cut_off()
            until = asyncio.get_running_loop().time() + _CUT_OFF_S
            await self._wait_for_requests(lambda: until)
        self._end()

    async def _wait_for_requests(self, deadline: Callable[[], float]) -> None:
        loop = asyncio.get_running_loop()
        while self._has_open_requests() and loop.time() < deadline():
            await asyncio.sleep(_DRAIN_CHECK_S)

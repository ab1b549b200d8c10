"""HTTP server: uvicorn with time limits, and the end on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from psannlm.errors import GenerationError
from psannlm.io.limits import describe_memory, machine_memory_bytes
from psannlm.models.accounting import cache_bytes
from psannlm.models.kv_cache import MAX_DECODE_TOKENS
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import gpu_memory_bytes
from psannlm.serving.app import build_app
from psannlm.serving.guard import HostRule
from psannlm.serving.limits import DRAIN_TIMEOUT_S, HEADER_TIMEOUT_S, KEEP_ALIVE_S
from psannlm.serving.scheduler import PREFILL_CHUNK_TOKENS, Scheduler
from psannlm.serving.service import Service
from psannlm.serving.sockets import bind_error
from psannlm.serving.worker import EngineThread

log = logging.getLogger(__name__)

_DRAIN_CHECK_S = 0.05
# Seconds that the last events of requests that are cut off have to be sent.
_CUT_OFF_S = 2.0
# Connections that may wait to be accepted.
_BACKLOG = 1024


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


class _TimedProtocol(H11Protocol):
    """HTTP/1.1 that drops a connection whose request line and headers do not arrive in time."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_request()

    def data_received(self, data: bytes) -> None:
        # Of a connection that is kept alive, the next request has begun.
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._await_request()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
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

    def _drop(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn that drains before it ends: the first signal refuses new requests, a second cuts off the open ones."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None], cut_off: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain, self._cut_off = drain, cut_off
        self._n_signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._n_signals += 1
        if self._n_signals == 1:
            self._drain()
        elif sig == signal.SIGINT:
            self._cut_off()


class HttpServer:
    """The server of one model: an engine thread, and uvicorn in the calling thread.

    Args:
        service: what the routes need, but the scheduler.
        prepare: makes the scheduler, in the engine thread.
        bound: from :func:`psannlm.serving.sockets.bind_socket`.
        on_ready: called in the engine thread once requests are taken.
    """

    def __init__(
        self,
        service: Service,
        prepare: Callable[[], Scheduler],
        bound: socket.socket,
        host_rule: HostRule,
        key: str | None,
        on_ready: Callable[[], None],
    ) -> None:
        self._service, self._bound = service, bound

        self._engine = EngineThread(prepare, on_ready, self._end)
        service.scheduler = lambda: self._engine.scheduler
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
            timeout_graceful_shutdown=2,
        )
        self._server = _Server(config, self.drain, self._end_drain)
        self._drain_ends_s = float("inf")
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> bool:
        """Serve until SIGTERM, SIGINT or a failure of the engine, which is raised.

        Returns:
            Whether a thread is left, which still prepares the engine: nothing can interrupt it.

        Raises:
            ConfigError: another process has begun to listen on the port.
        """
        try:
            self._bound.listen(_BACKLOG)
        except OSError as error:
            raise bind_error(error, *self._bound.getsockname()[:2]) from error
        asyncio.run(self._serve())
        is_left = not self._engine.stop()
        if self._engine.failure is not None:
            raise self._engine.failure
        return is_left

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        # One thread encodes prompts: each further one would keep memory of its own after the longest that it had.
        self._loop.set_default_executor(ThreadPoolExecutor(1, "encoding"))
        self._engine.start()
        await self._server.serve(sockets=[self._bound])

    def _end(self) -> None:
        self._server.should_exit = True

    def _end_drain(self) -> None:
        self._drain_ends_s = 0.0

    def drain(self) -> None:
        """Refuse new requests, and end once the open ones have ended or their time is over."""
        self._service.is_draining = True
        scheduler = self._engine.scheduler
        if scheduler is not None and scheduler.has_work:
            log.info(f"ending: open requests have {DRAIN_TIMEOUT_S:g} s; press Ctrl-C again to cut them off")
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        self._draining = asyncio.ensure_future(self._wait_and_end())

    def _has_open_requests(self) -> bool:
        scheduler = self._engine.scheduler
        return scheduler is not None and bool(scheduler.has_work or self._server.server_state.tasks)

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

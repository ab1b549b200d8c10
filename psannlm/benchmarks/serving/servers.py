"""Servers under measurement as child processes on loopback: ours, transformers serve and llama-cpp-python's."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from psannlm.benchmarks.serving.exchange import (
    COMPLETIONS,
    Address,
    Answer,
    Recording,
    Response,
    exchange,
    http_request,
    parse_completion,
    parse_response,
)
from psannlm.errors import ConfigError, WorkerError, install_extra, nearest
from psannlm.runtime.process_tree import tree_resident_bytes
from psannlm.runtime.processes import python_command
from psannlm.serving.http_process import require_packages

OURS = "psannlm"
_POLL_S = 0.1
# Of the paged cache of transformers, and the tokens of all rows that it computes in one pass.
_CACHE_BLOCK_TOKENS, _PASS_TOKENS = 32, 1024
_LOG_LINES = 5
_LONGEST_LOG_BYTES = 20_000
# What our server takes to end open requests after SIGTERM, and a little more.
_STOP_S = 40.0
# transformers reads its hub at every start otherwise, and waits where there is no network.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


# Packages that a reference server and the export for it need, with the extra that has the export's.
_OF_TRANSFORMERS = (("transformers", "fastapi", "uvicorn", "openai"), "hf")
_PACKAGES = {
    "transformers": _OF_TRANSFORMERS,
    "transformers-batched": _OF_TRANSFORMERS,
    "llama.cpp": (
        ("gguf", "llama_cpp", "fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings"),
        "gguf",
    ),
}
_DISTRIBUTIONS = {
    "llama_cpp": "llama-cpp-python",
    "sse_starlette": "sse-starlette",
    "starlette_context": "starlette-context",
    "pydantic_settings": "pydantic-settings",
}


@dataclass(frozen=True)
class ServerSpec:
    """How to start a server and what it understands.

    Attributes:
        name: of the server in tables.
        description: what it is, with its version and settings.
        command: the command for a port.
        ready_path: path that answers 200 once the server takes requests.
        fields: fields of every request beside the common ones.
        environment: environment variables of its process.
    """

    name: str
    description: str
    command: Callable[[int], list[str]]
    ready_path: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def ours(
    model_file: Path, *, dtype: str, is_compiled: bool, max_batch: int, max_queue: int, max_tokens: int, device: str
) -> ServerSpec:
    """Return our server of ``model_file``."""
    options = ["--dtype", dtype, "--max-batch", str(max_batch), "--max-queue", str(max_queue)]
    options += ["--max-tokens", str(max_tokens), "--no-page", "--metrics", *(["--compile"] if is_compiled else [])]
    options += ["--device", device]

    def command(port: int) -> list[str]:
        return python_command("psannlm", "serve", str(model_file), "--port", str(port), *options, end_with_parent=True)

    described = f"psannlm serve --dtype {dtype} --max-batch {max_batch}{' --compile' if is_compiled else ''}"
    return ServerSpec(OURS, described, command, "/health", {"stream_options": {"include_usage": True}})


def transformers(folder: Path, *, dtype: str, device: str) -> ServerSpec:
    """Return ``transformers serve`` of the exported ``folder``, which answers one request at a time."""
    described = f"transformers serve {_version('transformers')}, --dtype {dtype}: one request at a time"
    return _transformers("transformers", described, folder, ["--device", device, "--dtype", dtype])


def transformers_batched(folder: Path, *, dtype: str, device: str, n_rows: int, n_tokens: int) -> ServerSpec:
    """Return ``transformers serve --continuous-batching`` with a paged cache for ``n_rows`` rows of ``n_tokens``."""
    # By default the cache takes most of the machine's memory.
    n_blocks = n_rows * -(-n_tokens // _CACHE_BLOCK_TOKENS)
    options = ["--device", device, "--dtype", dtype, "--continuous-batching"]
    options += ["--cb-block-size", str(_CACHE_BLOCK_TOKENS), "--cb-num-blocks", str(n_blocks)]
    options += ["--cb-max-batch-tokens", str(_PASS_TOKENS)]
    described = f"transformers serve {_version('transformers')}, --dtype {dtype} --continuous-batching"
    return _transformers("transformers-batched", described, folder, options)


def _transformers(name: str, described: str, folder: Path, options: list[str]) -> ServerSpec:
    def command(port: int) -> list[str]:
        place = ["--host", "127.0.0.1", "--port", str(port)]
        arguments = ["serve", str(folder), *place, *options]
        return python_command("transformers.cli.transformers", *arguments, end_with_parent=True)

    return ServerSpec(name, described, command, "/health", {"model": str(folder)}, _OFFLINE)


def llama_cpp(model_file: Path, *, n_context: int, threads: int) -> ServerSpec:
    """Return llama-cpp-python's server of the exported GGUF file."""

    def command(port: int) -> list[str]:
        options = ["--model", str(model_file), "--host", "127.0.0.1", "--port", str(port), "--n_ctx", str(n_context)]
        options += ["--n_threads", str(threads), "--n_threads_batch", str(threads), "--verbose", "False"]
        # By default a new request ends the one that is being answered.
        return python_command("llama_cpp.server", *options, "--interrupt_requests", "False", end_with_parent=True)

    described = f"llama-cpp-python's server {_version('llama_cpp')}: one request at a time"
    return ServerSpec("llama.cpp", described, command, "/v1/models", {"repeat_penalty": 1.0})


def require_servers(names: Sequence[str]) -> None:
    """Check that our server and the reference servers of ``names`` can be started.

    Raises:
        ConfigError: one of ``names`` is unknown, or a package that a server needs is missing.
    """
    require_packages()
    for name in names:
        if name not in _PACKAGES:
            known = ", ".join(_PACKAGES)
            raise ConfigError(f"--against {name!r} is not one of {known}{nearest(name, tuple(_PACKAGES))}")
        packages, extra = _PACKAGES[name]
        missing = [package for package in packages if find_spec(package) is None]
        if missing:
            listed = " ".join(_DISTRIBUTIONS.get(package, package) for package in missing)
            raise ConfigError(
                f"--against {name} starts its server, which needs {listed}: {install_extra(extra)}, then "
                f"pip install -c constraints.txt {listed}; or leave out --against {name}"
            )


def _version(package: str) -> str:
    return str(importlib.import_module(package).__version__)


class Server:
    """A server process; leaving the context ends it and all that it started.

    Args:
        spec: what to start.
        start_timeout_s: seconds in which it must take requests.

    Attributes:
        address: where it listens.
        ready_s: seconds from the start until it took requests.

    Raises:
        WorkerError: it ended or did not take requests in time; the message has the last lines that it printed.
    """

    def __init__(self, spec: ServerSpec, *, start_timeout_s: float = 300.0) -> None:
        self.spec = spec
        self.address = Address("127.0.0.1", _free_port())
        self._folder = Path(tempfile.mkdtemp(prefix="psannlm-serve-"))
        self._log = self._folder / "log"
        began = time.monotonic()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                spec.command(self.address.port),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **spec.environment},
                start_new_session=True,
            )
        try:
            self._wait_until_ready(began + start_timeout_s)
        except BaseException:
            self.close()
            raise
        self.ready_s = time.monotonic() - began
        self.model = str(spec.fields.get("model") or model_name(self))

    def _wait_until_ready(self, deadline: float) -> None:
        while self.get(self.spec.ready_path).status != 200:
            if self.process.poll() is not None:
                code = self.process.returncode
                raise WorkerError(f"{self.spec.name}: its server ended with exit code {code}{self._why()}")
            if time.monotonic() > deadline:
                raise WorkerError(f"{self.spec.name}: its server took no requests in time{self._why()}")
            time.sleep(_POLL_S)

    def require_alive(self) -> None:
        """Raise WorkerError if the server has ended."""
        if self.process.poll() is not None:
            code = self.process.returncode
            raise WorkerError(f"{self.spec.name}: its server ended under load, with exit code {code}{self._why()}")

    def _why(self) -> str:
        printed = self.printed().splitlines()[-_LOG_LINES:]
        return f"; it printed: {' / '.join(line.strip() for line in printed)}" if printed else ", and printed nothing"

    def printed(self) -> str:
        """Return the end of what the server printed."""
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - _LONGEST_LOG_BYTES))
            return log.read().decode("utf-8", errors="replace")

    def get(self, path: str, timeout_s: float = 10.0) -> Response:
        """Send a GET and return the response."""
        request = http_request(self.address, "GET", path)
        return parse_response(asyncio.run(exchange(self.address, request, timeout_s=timeout_s)))

    def completion_request(self, fields: Mapping[str, Any]) -> bytes:
        """Return the bytes of a request for a completion with ``fields``, and those that this server needs."""
        own = {key: value for key, value in self.spec.fields.items() if key != "stream_options" or fields.get("stream")}
        return http_request(self.address, "POST", COMPLETIONS, {"model": self.model, **fields, **own})

    async def send(self, fields: Mapping[str, Any], *, timeout_s: float, due_s: float | None = None) -> Recording:
        """Send a request for a completion and record the response."""
        return await exchange(self.address, self.completion_request(fields), timeout_s=timeout_s, due_s=due_s)

    def complete(self, fields: Mapping[str, Any], *, timeout_s: float) -> Answer:
        """Send one request for a completion and return the answer."""
        return parse_completion(asyncio.run(self.send(fields, timeout_s=timeout_s)))

    def resident_bytes(self) -> int | None:
        """Return the memory that the server and its child processes hold; None where it cannot be known."""
        return tree_resident_bytes(self.process.pid)

    def stop(self) -> int:
        """Ask the server to stop (SIGTERM) and return its exit code; it is killed where it does not."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._kill()
        return int(self.process.returncode)

    def _kill(self) -> None:
        """Kill the session of the server: it and its child processes."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def close(self) -> None:
        """End the server at once, and all that it started."""
        self._kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def model_name(server: Server) -> str:
    """Return the first model that the server lists, or an empty string."""
    try:
        listed = json.loads(server.get("/v1/models").body)["data"]
        return str(listed[0]["id"]) if listed else ""
    except (ValueError, LookupError, TypeError):
        return ""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

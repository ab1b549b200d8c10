"""Connection of ``prep`` to a Ray cluster: a private one on this machine, or one that is named by its address.

Ray's defaults suit no command that handles files of others: it reports usage, opens a dashboard, lets workers import
from the working folder, replaces the handler of SIGTERM and leaves logs in a shared folder. All of that is set here.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from psannlm.errors import ConfigError, WorkerError, install_extra
from psannlm.prep.ray_worker import differing_file, differing_versions, version_reporter
from psannlm.prep.reader import SourceFile

log = logging.getLogger(__name__)

_LOOPBACK = "127.0.0.1"
_CONNECT_S = 5.0
# As on Windows and macOS: otherwise Ray replaces a loopback address by one that the network reaches.
_LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# Where something else than Ray listens, Ray repeats for minutes what fails; these bound it to ten seconds.
_RETRIES = "NUM_REDIS_GET_RETRIES"
_IMPATIENT = {
    f"RAY_{_RETRIES}": "1",
    "RAY_gcs_rpc_server_connect_timeout_s": "2",
    "RAY_py_gcs_connect_timeout_s": "4",
}
_NODES_S = 60.0
_FILES_CHECKED = 64
# Of a local cluster, for its process's life: Ray reads a token once. It is in the environment of our processes alone.
_OWN_TOKEN = secrets.token_hex(32)
_TOKEN_NAMES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
# Ray's sockets are below this folder with names of about 60 characters, and a socket's path has at most 107.
_MAX_FOLDER = 40


@contextmanager
def ray_connection(address: str | None, n_workers: int, store_bytes: int) -> Iterator[Any]:
    """Yield the module ray, connected to the cluster at ``address``, or to one of its own on this machine.

    Args:
        address: host:port; None starts a cluster that only this machine can reach and that ends with the context.
        n_workers: cores of a cluster of its own; a cluster at an address has its own number.
        store_bytes: maximum of the shared memory of a cluster of its own, in bytes.

    Raises:
        ConfigError: ray is not installed, the address is not one of a cluster, or the cluster refuses the connection.
    """
    with _restored_environment(), _private_folder() as folder:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if address is None and not any(os.environ.get(name) for name in _TOKEN_NAMES):
            os.environ["RAY_AUTH_TOKEN"] = _OWN_TOKEN
        if address is None:
            os.environ[_LOOPBACK_ONLY] = "0"
        else:
            os.environ.update(_IMPATIENT)
            _require_listener(address)
        ray = _module()
        if ray.is_initialized():
            raise ConfigError("this process is connected to a Ray cluster already; call ray.shutdown() first")
        own = {
            "num_cpus": n_workers,
            "num_gpus": 0,
            "object_store_memory": store_bytes,
            "include_dashboard": False,
            "_node_ip_address": _LOOPBACK,
            "_temp_dir": str(folder),
        }
        # Otherwise Ray puts the working folder first on the import path of its workers.
        job = import_module("ray.job_config").JobConfig(_client_job=True)
        common = {"job_config": job, "log_to_driver": False, "logging_level": logging.CRITICAL}
        try:
            if address is not None:
                _require_outer_address(ray, address)
            with _kept_handler(signal.SIGTERM), _silent_stderr():
                ray.init(address="local" if address is None else address, **common, **(own if address is None else {}))
        except Exception as error:
            # Where a node does not start in time, Ray raises the base class itself.
            known = (ray.exceptions.RayError, OSError, RuntimeError, ValueError)
            if isinstance(error, known) or type(error) is Exception:
                raise _refusal(address, error) from error
            raise
        try:
            yield ray
        finally:
            ray.shutdown()


def check_nodes(ray: Any, ours: Mapping[str, str]) -> int:
    """Check that every node with cores has our versions of what decides the tokens; return the number of nodes.

    Raises:
        ConfigError: a node has other versions, or no psannlm; names it.
        WorkerError: a node does not answer.
    """
    n_nodes = 0
    for name, found in _ask_nodes(ray, version_reporter()):
        n_nodes += 1
        name = f"{found['host']} ({name})"
        if "missing" in found:
            raise ConfigError(
                f"psannlm cannot be imported on the Ray node {name}: {found['missing']}. Install the same version there"
            )
        if differing := differing_versions(found["versions"], ours):
            raise other_versions(name, differing)
    return n_nodes


def check_files(ray: Any, files: Sequence[SourceFile]) -> None:
    """Check that every node with cores sees the files of a corpus as this machine does.

    Of many files, 64 are looked at; a task checks those that it reads itself.

    Raises:
        ConfigError: a node cannot read a file, or sees another size or time; names both.
        WorkerError: a node does not answer.
    """
    step = max(1, len(files) // _FILES_CHECKED)
    for name, (host, problem) in _ask_nodes(ray, differing_file, list(files[::step])):
        if problem:
            raise ConfigError(
                f"--read-on workers: the Ray node {host} ({name}) does not see the corpus as this machine does: "
                f"{problem}. Make the same files readable on every node, or give --read-on driver"
            )


def _ask_nodes(ray: Any, function: Callable[..., Any], *arguments: Any) -> Iterator[tuple[str, Any]]:
    """Run a function on every node with cores; yield the address of each and its result.

    Raises:
        WorkerError: a node does not answer.
    """
    affinity = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    asked = [
        task.options(scheduling_strategy=affinity(node["NodeID"], soft=False)).remote(*arguments) for node in nodes
    ]
    for node, reference in zip(nodes, asked, strict=True):
        name = node["NodeManagerAddress"]
        try:
            yield name, ray.get(reference, timeout=_NODES_S)
        except ray.exceptions.RayError as error:
            # A node that ended a moment ago is listed until its heartbeats are missed.
            is_gone = isinstance(error, ray.exceptions.TaskUnschedulableError)
            if is_gone or not any(each["NodeID"] == node["NodeID"] and each["Alive"] for each in ray.nodes()):
                continue
            raise WorkerError(f"the Ray node {name} does not run a task: {one_line(error)}") from error


def other_versions(node: str, differing: str) -> ConfigError:
    """Return the error for a node with other versions than this machine."""
    return ConfigError(
        f"the Ray node {node} has {differing}: its tokens could differ. Install the versions of this machine there"
    )


def one_line(error: BaseException) -> str:
    """Return the last line of a message of Ray's, which may hold a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _module() -> Any:
    is_loaded = "ray" in sys.modules
    try:
        ray = import_module("ray")
        if is_loaded:
            # Ray read the environment when it was loaded, and this is how it reads it again.
            import_module("ray._raylet").Config.initialize("")
            setattr(import_module("ray._private.ray_constants"), _RETRIES, int(os.environ.get(f"RAY_{_RETRIES}", 20)))
        return ray
    except ImportError:
        raise ConfigError(
            f"--engine ray needs the package ray, which is not installed; {install_extra('cluster')}"
        ) from None


def _require_listener(address: str) -> None:
    """Raise ConfigError unless something listens at ``address``: Ray itself waits for half a minute."""
    if "://" in address:
        raise ConfigError(
            f"--ray-address {address}: Ray Client is not supported. Run psannlm on a node of the cluster, and give the "
            "host:port that ray start --head printed"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"--ray-address {address}: not HOST:PORT, such as 10.0.0.7:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except OSError as error:
        raise ConfigError(
            f"--ray-address {address}: no Ray cluster is there ({error.strerror or error}); ray start --head prints "
            "the address of a cluster"
        ) from error


def _require_outer_address(ray: Any, address: str) -> None:
    """Raise ConfigError for a cluster on the loopback interface: Ray takes this machine's own address instead of it."""
    host, _, port = address.rpartition(":")
    if host in ("localhost", _LOOPBACK, "[::1]") and (own := ray.util.get_node_ip_address()) != _LOOPBACK:
        try:
            socket.create_connection((own, int(port)), _CONNECT_S).close()
        except OSError:
            raise ConfigError(
                f"--ray-address {address}: no Ray cluster is at {own}:{port}, where Ray looks for one of this machine; "
                f"start it with ray start --head --node-ip-address {own}"
            ) from None


def _refusal(address: str | None, error: Exception) -> ConfigError:
    if address is None:
        return ConfigError(f"a Ray cluster cannot be started on this machine: {one_line(error)}")
    reason = one_line(error.__cause__ or error)
    if isinstance(error, ConnectionError) and "uthentication" not in reason:
        reason = f"no Ray cluster answers there ({reason})"
    return ConfigError(f"--ray-address {address}: {reason}")


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discard what is written to the file descriptor of stderr: Ray's libraries write to it beside their exceptions."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _private_folder() -> Iterator[Path]:
    """Yield a new folder for the sockets and logs of a cluster of our own; it is removed at the end."""
    parent = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="psannlm-ray-", dir=parent if len(parent) < _MAX_FOLDER else "/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _kept_handler(number: signal.Signals) -> Iterator[None]:
    """Restore the handler of a signal, which Ray replaces: ours lets chunks on their way be finished."""
    handler = signal.getsignal(number)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, handler)


@contextmanager
def _restored_environment() -> Iterator[None]:
    """Restore at the end the environment variables that Ray and we set."""
    former = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - former.keys():
            del os.environ[name]
        os.environ.update(former)

"""Launcher of N training processes on this machine, one per rank (``psannlm train --nproc N``).

Ranks join through a private folder and communicate over the loopback interface: no port is open to other machines, and
no pickle is read, as in the rendezvous of torchrun.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING

from psannlm.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, ConfigError, DeviceError
from psannlm.runtime.cores import threads_for
from psannlm.runtime.processes import python_command
from psannlm.runtime.signals import stop_signals

if TYPE_CHECKING:
    from psannlm.config.run import RunConfig

# After a signal, ranks get time to write a large checkpoint. After a failure there is nothing to save.
_STOP_S = 3600.0
_FAILED_S = 30.0
_POLL_S = 0.05
_CONFIG_FILE = "config.yaml"
# Environment variables of the ranks: a launcher itself reports which rank was killed; and the private folder of the
# key-value store of one machine, where torchrun uses a port. They stand here because the modules that read them import
# torch, which takes the launching process seconds, and which it needs only to count GPUs.
LAUNCHED = "PSANNLM_LAUNCHED"
STORE_FOLDER = "PSANNLM_STORE_FOLDER"
_LOOPBACK = ("lo", "lo0")

Process = subprocess.Popen[bytes]


def check_launch(n_ranks: int, device: str) -> None:
    """Check that ``n_ranks`` processes can be launched, before any of them starts.

    Raises:
        ConfigError: fewer than one rank, or this process is itself a rank.
        DeviceError: there are fewer GPUs than ranks.
    """
    if n_ranks < 1:
        raise ConfigError(f"--nproc {n_ranks}: give the number of processes, 1 or more")
    if "RANK" in os.environ:
        raise ConfigError(
            "--nproc starts the ranks itself, and torchrun has started this process; use only one of them"
        )
    if device.startswith("cuda:") and n_ranks > 1:
        raise ConfigError(f"train.device {device} is one GPU for {n_ranks} ranks; use device: cuda, one GPU for each")
    if device == "cpu":
        return
    import torch

    n_gpus = torch.cuda.device_count()
    if n_gpus and n_ranks > n_gpus:
        raise DeviceError(f"--nproc {n_ranks} needs {n_ranks} GPUs, and there are {n_gpus}; use --nproc {n_gpus}")


def launch(config: RunConfig, n_ranks: int, options: Sequence[str] = (), *, debug: bool = False) -> int:
    """Train ``config`` with ``psannlm train`` in ``n_ranks`` processes; return the exit code.

    Ctrl-C, SIGTERM and SIGHUP are forwarded, and the ranks get time to save. If a rank fails, the others are stopped.
    Each rank prints its own error.

    Args:
        options: further command-line options of ``psannlm train``.
        debug: show the traceback of an error.

    Raises:
        DeviceError: this machine has no loopback interface that works.
    """
    # Imported here: a module that only reads the names above should not load the whole configuration.
    from psannlm.config.run import to_yaml

    environment = {LAUNCHED: "1"}
    with private_store(n_ranks) as place, _received() as signals:
        path = Path(place[STORE_FOLDER]) / _CONFIG_FILE
        # A copy for the ranks: a pipe cannot be read twice, and the file may change.
        path.write_text(to_yaml(config), encoding="utf-8")
        arguments = [*(["--debug"] if debug else []), "train", str(path), *options]
        ranks: list[Process] = []
        try:
            for rank in range(n_ranks):
                ranks.append(start_rank(rank, arguments, {**place, **environment}))
            return _watch(ranks, signals)
        finally:
            _kill(ranks)


@contextmanager
def private_store(n_ranks: int) -> Iterator[dict[str, str]]:
    """Create the private store folder of ``n_ranks`` processes; yield the environment variables that name it.

    Raises:
        DeviceError: this machine has no loopback interface that works.
    """
    interface = _loopback_interface(n_ranks)
    with tempfile.TemporaryDirectory(prefix="psannlm-ranks-", ignore_cleanup_errors=True) as folder:  # mode 0700
        yield {
            STORE_FOLDER: folder,
            "WORLD_SIZE": str(n_ranks),
            "LOCAL_WORLD_SIZE": str(n_ranks),
            **threads_for(n_ranks),
            # By default, both listen on the address of the first interface that they find.
            "GLOO_SOCKET_IFNAME": interface,
            "NCCL_SOCKET_IFNAME": f"={interface}",
        }


def start_rank(
    rank: int, arguments: Sequence[str], place: Mapping[str, str], output: IO[bytes] | None = None
) -> Process:
    """Start ``psannlm`` with ``arguments`` as one rank, in its own session.

    On Linux it gets SIGTERM if this process ends without waiting for it.
    """
    return subprocess.Popen(
        python_command("psannlm", *arguments, end_with_parent=True),
        env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        # So that a signal from the terminal reaches it only once, from this process.
        start_new_session=True,
    )


def _watch(ranks: Sequence[Process], signals: list[int]) -> int:
    """Wait for all ranks, forward ``signals`` as they arrive, and return the common exit code."""
    n_sent, kill_at = 0, float("inf")
    first: int | None = None
    while any(rank.poll() is None for rank in ranks):
        for number in signals[n_sent:]:
            # Forward the first Ctrl-C as SIGTERM, which has the same effect on a training rank: a rank that is still
            # importing its libraries then ends without a traceback.
            is_polite = n_sent == 0 and number == signal.SIGINT
            _send(ranks, signal.SIGTERM if is_polite else number)
            n_sent += 1
            kill_at = min(kill_at, time.monotonic() + _stop_s())
        failed = [at for at, rank in enumerate(ranks) if rank.poll()]
        if failed and first is None:
            first = failed[0]
            kill_at = min(kill_at, time.monotonic() + _FAILED_S) if n_sent == 0 else kill_at
            if n_sent == 0:
                _send(ranks, signal.SIGTERM)
            elif ranks[first].returncode < 0:
                # It was killed before it could save: the others would wait for it forever.
                kill_at = min(kill_at, time.monotonic() + _FAILED_S)
        if time.monotonic() >= kill_at:
            _kill(ranks)
        time.sleep(_POLL_S)
    codes = [rank.returncode for rank in ranks]
    if not any(codes):
        return EXIT_OK
    if signals:
        reported = [code for code in codes if code > 0]
        if not reported:
            sys.stderr.write("interrupted\n")
        return next((code for code in reported if code != EXIT_INTERRUPTED), EXIT_INTERRUPTED)
    at = first if first is not None else next(at for at, code in enumerate(codes) if code)
    if codes[at] > 0:
        return codes[at]
    name = signal.Signals(-codes[at]).name
    sys.stderr.write(f"error: rank {at} was killed by {name}; the others were stopped\n")
    return EXIT_FAILED


def _stop_s() -> float:
    """Return the seconds that ranks get to save; torchrun reads the same environment variable."""
    return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _STOP_S))


def _send(ranks: Sequence[Process], number: int) -> None:
    for rank in ranks:
        rank.send_signal(number)  # no effect on an ended process


def _kill(ranks: Sequence[Process]) -> None:
    """Kill the ranks and their child processes."""
    for rank in ranks:
        if rank.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()


@contextmanager
def _received() -> Iterator[list[int]]:
    """Yield a list to which every received stop signal is appended."""
    numbers: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield numbers
        return

    def note(number: int, frame: FrameType | None) -> None:
        numbers.append(number)

    former = {number: signal.signal(number, note) for number in stop_signals()}
    try:
        yield numbers
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _loopback_interface(n_ranks: int) -> str:
    """Return the name of the loopback interface. Raises DeviceError if it does not work."""
    names = [name for _, name in socket.if_nameindex() if name in _LOOPBACK]
    try:
        with socket.socket() as listener, socket.socket() as caller:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            caller.connect(listener.getsockname())
    except OSError:
        names = []
    if not names:
        raise DeviceError(
            f"{n_ranks} ranks communicate over the loopback interface, which is down or missing: bring it up "
            "(ip link set lo up), or train in one process, without --nproc"
        )
    return names[0]

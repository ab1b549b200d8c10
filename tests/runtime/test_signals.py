"""Stop signals set the flag; output to a closed reader does not end the work before it is saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from psannlm.runtime.signals import stopping_on_signals

WORK = """
import sys, threading, time
from psannlm.runtime.signals import stopping_on_signals
stop = threading.Event()
with stopping_on_signals(stop):
    while not stop.is_set():
        print("at work", flush=True)
        print("at work", file=sys.stderr, flush=True)
        time.sleep(0.02)
open(sys.argv[1], "w").write("saved")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_stop_signals_set_the_flag(name: str) -> None:
    stop, number = threading.Event(), signal.Signals[name]
    former = signal.getsignal(number)
    with stopping_on_signals(stop):
        os.kill(os.getpid(), number)
        assert stop.wait(5)
    assert signal.getsignal(number) == former


def test_stop_signals_keep_ignored_sighup() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = threading.Event()
        with stopping_on_signals(stop):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.wait(0.1)
    finally:
        signal.signal(signal.SIGHUP, former)


def test_closed_pipe_sets_stop_flag(tmp_path: object) -> None:
    saved = os.path.join(str(tmp_path), "saved")
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", WORK, saved], stdout=write, stderr=write)
    os.close(write)
    assert os.read(read, 7) == b"at work"
    os.close(read)
    assert process.wait(60) == 0
    assert os.path.exists(saved)


@pytest.mark.skipif(sys.platform != "linux", reason="terminals of Linux")
def test_closed_terminal_sets_stop_flag(tmp_path: object) -> None:
    import pty

    saved = os.path.join(str(tmp_path), "saved")
    master, slave = pty.openpty()
    command = "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n" + WORK
    process = subprocess.Popen(
        [sys.executable, "-c", command, saved], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    assert os.read(master, 7) == b"at work"
    os.close(master)
    assert process.wait(60) == 0
    assert os.path.exists(saved)

"""What a Slurm job of a study does: it trains one run, saves it before the job ends, and is requeued to resume it."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from subprocess import Popen
from types import FrameType
from typing import Any

from psannlm.errors import EXIT_INTERRUPTED
from psannlm.experiments.local_launcher import start_training

_POLL_S = 0.2


class TrainingJob:
    """The function of a submitit job. It trains in a process of its own, whose output is in the run's log.

    submitit handles the signal that Slurm sends before a time limit or a preemption (SIGUSR2): it calls
    :meth:`checkpoint` and requeues the job, which then resumes the run.
    """

    # Jobs that earlier versions submitted, and that are requeued, lack it.
    _trunk: Path | None = None

    def __init__(self, name: str, config: Path, log_path: Path, trunk: Path | None = None) -> None:
        self._name, self._config, self._log_path, self._trunk = name, config, log_path, trunk
        self._process: Popen[bytes] | None = None

    def __call__(self) -> int:
        """Train, and return the exit code.

        Raises:
            SystemExit: a signal ended the training, so that the job has no result, and Slurm knows why.
        """
        environment = {}
        # Where Slurm does not bind tasks to their cores, torch would use all of the node's.
        if "OMP_NUM_THREADS" not in os.environ and (cores := os.environ.get("SLURM_CPUS_PER_TASK")):
            environment["OMP_NUM_THREADS"] = cores
        # Slurm signals every process of a job. The blocked signal is blocked in the new process for good, which it
        # would end without a checkpoint; here it is only delayed.
        before_end = {getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"))}
        signal.pthread_sigmask(signal.SIG_BLOCK, before_end)
        try:
            self._process = self._start(environment)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, before_end)
        signal.signal(signal.SIGTERM, self._forward)
        try:
            # Not wait(): a signal handler cannot wait for the same process, whose lock is held.
            while (code := self._process.poll()) is None:
                time.sleep(_POLL_S)
        except BaseException:
            self._end()
            raise
        if code == EXIT_INTERRUPTED:
            sys.exit(code)
        return code

    def checkpoint(self) -> Any:
        """Let the training save and end, and return what the requeued job does: the same."""
        self._end()
        # Optional, so no import statement: every module needs declared dependencies only.
        helpers = import_module("submitit.helpers")
        return helpers.DelayedSubmission(type(self)(self._name, self._config, self._log_path, self._trunk))

    def _start(self, environment: dict[str, str]) -> Popen[bytes]:
        files = self._config, self._log_path
        return start_training(self._name, *files, environment, self._trunk, end_with_parent=True)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def _end(self) -> None:
        """Ask the training to save, and wait for its end."""
        if self._process is None or self._process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGTERM)
        # This may run in a signal handler, in the middle of poll(), which then still finds the process.
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)

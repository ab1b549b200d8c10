"""Scheduler of an ablation study: trains its runs as processes, several at a time, and resumes them."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from psannlm.errors import EXIT_INTERRUPTED, Interrupted, PsannlmError
from psannlm.experiments.finished_runs import RUNS_FILE, add_finished_run, is_own_runs_file, kept_runs
from psannlm.experiments.gpu_slots import GpuSlots, Placement
from psannlm.experiments.local_launcher import LOG_START, Launcher, Process, launch
from psannlm.experiments.model import Study, StudyRun, fits_tokenizer, tokenizer_path
from psannlm.experiments.run_state import read_status
from psannlm.experiments.sizing import write_configs
from psannlm.io.atomic import explain_write_errors, read_small, refuse_foreign, remove_leftovers
from psannlm.io.lock import RunLock
from psannlm.io.run_metadata import write_json
from psannlm.runtime.signals import stopping_on_signals
from psannlm.training.run_folder import has_same_config, is_own_config

log = logging.getLogger(__name__)

STUDY_FILE = "study.json"
_POLL_S = 0.2
_STATUS_S = 2.0
_LIST_BYTES = 16 << 20
_REMEDY = "or choose another folder with --study"
_ONE_AT_A_TIME = Placement()


def run_all(
    study: Study,
    *,
    placement: Placement = _ONE_AT_A_TIME,
    only: Collection[str] | None = None,
    on_status: Callable[[str], None] = lambda text: None,
    launcher: Launcher = launch,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Train every unfinished run; a run that fails is reported, and the others continue.

    A run that diverged (non-finite) is not rerun: the result would be the same.

    Args:
        placement: number of runs at the same time, which divide the CPU cores, and the GPU of each.
        only: names of the runs to train; None for all.
        on_status: called with a line of progress every two seconds.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the active runs have saved, and the same call resumes them.
        StorageError: the study's folder cannot be written, or another process uses it.
    """
    with RunLock(study.folder, "--study"):
        refuse_foreign_files(study)
        write_configs(study)
        plan = study.plan
        names = [run.name for run in study.runs]
        content = {"study": plan.name, "plan": str(plan.path), "runs": names, **placement.as_dict()}
        write_json(study.folder / STUDY_FILE, content)
        _add_missing_lines(study)
        wanted = [run for run in study.runs if only is None or run.name in only]
        waiting = [run for run in wanted if not read_status(run).is_settled]
        scheduler = _Scheduler(len(wanted), waiting, launcher, GpuSlots(placement, len(waiting)), clock)
        stop = threading.Event()
        next_status = clock()
        with explain_write_errors(study.folder), stopping_on_signals(stop), scheduler.stopping_on_error(sleep):
            while scheduler.is_busy:
                if stop.is_set():
                    scheduler.stop(sleep)
                    raise Interrupted(
                        f"stopped with {scheduler.n_done} of {len(wanted)} runs done; the same command resumes them"
                    )
                scheduler.fill()
                for line in scheduler.collect():
                    log.info(line)
                if scheduler.was_interrupted:
                    stop.set()
                if clock() >= next_status:
                    on_status(scheduler.status())
                    next_status = clock() + _STATUS_S
                if scheduler.is_busy:
                    sleep(_POLL_S)


def _add_missing_lines(study: Study) -> None:
    """Add the runs to the record that ended while no one waited for them."""
    known = kept_runs(study.folder)
    with explain_write_errors(study.folder):
        for state in map(read_status, study.runs):
            if state.state == "done" and state.run.name not in known:
                add_finished_run(study.folder / RUNS_FILE, state)


def refuse_foreign_files(study: Study) -> None:
    """Refuse to overwrite files in a study's folder that the study did not write.

    An existing tokenizer is read and compared, and never overwritten.

    Raises:
        StorageError: a foreign file is in the way; the message names it.
    """
    with explain_write_errors(study.folder):
        remove_leftovers(study.folder)
    refuse_foreign(study.folder / STUDY_FILE, lambda path: _listed_runs(path) is not None, _REMEDY)
    refuse_foreign(study.folder / RUNS_FILE, is_own_runs_file, _REMEDY)
    listed = _listed_runs(study.folder / STUDY_FILE) or []
    for config in study.data:
        if fits_tokenizer(config):
            path = tokenizer_path(study.plan, config, study.data, study.folder)
            refuse_foreign(path, lambda path: True, _REMEDY)
    for run in study.runs:
        if not has_same_config(run.config_path, run.config):
            refuse_foreign(run.config_path, is_own_config, _REMEDY)
        is_ours = (lambda path: True) if run.name in listed else _is_own_log
        refuse_foreign(run.log_path, is_ours, _REMEDY)


def _listed_runs(path: Path) -> list[str] | None:
    """Return the run names of a study's ``study.json``, or None if the file is not one."""
    try:
        content = json.loads(read_small(path, _LIST_BYTES) or b"")
    except (ValueError, RecursionError):
        return None
    is_list = isinstance(content, dict) and content.keys() >= {"study", "plan", "runs"}
    return content["runs"] if is_list and isinstance(content["runs"], list) else None


def _is_own_log(path: Path) -> bool:
    """Whether a log begins as :func:`local_launcher.start_training` begins it."""
    with open(path, "rb") as file:
        return file.read(len(LOG_START)) == LOG_START.encode("ascii")


class _Scheduler:
    """Active processes and waiting runs, with an estimate of the remaining time."""

    def __init__(
        self,
        n_runs: int,
        waiting: list[StudyRun],
        launcher: Launcher,
        slots: GpuSlots,
        clock: Callable[[], float],
    ) -> None:
        self._waiting, self._launcher, self._slots, self._clock = waiting, launcher, slots, clock
        self._active: dict[str, tuple[StudyRun, Process, str | None]] = {}
        self._n_runs = n_runs
        self.n_done = self._n_runs - len(waiting)
        self.was_interrupted = False
        self._began = clock()
        self._first = {run.name: read_status(run).step for run in waiting}
        self._all_flops = sum(run.flops_left(self._first[run.name]) for run in waiting)

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or self._active)

    def fill(self) -> None:
        """Start waiting runs while there is a place for one."""
        while self._waiting and len(self._active) < self._slots.placement.jobs and not self.was_interrupted:
            run = self._waiting.pop(0)
            gpu = self._slots.take()
            self._active[run.name] = run, self._launcher(run, self._slots.environment(gpu)), gpu

    def collect(self) -> list[str]:
        """Collect the processes that ended, and return a line for each."""
        lines = []
        for run, process, gpu in list(self._active.values()):
            code = process.poll()
            if code is None:
                continue
            del self._active[run.name]
            self._slots.free(gpu)
            self.was_interrupted |= code == EXIT_INTERRUPTED
            state = read_status(run)
            self.n_done += state.state == "done"
            if state.state == "done" and state.record is not None:
                add_finished_run(run.study / RUNS_FILE, state)
                loss = state.record.eval_rows[-1]["loss"]
                lines.append(f"{run.name}: validation loss {loss:.4f} ({self.n_done} of {self._n_runs} done)")
            elif code != EXIT_INTERRUPTED:
                lines.append(f"{run.name}: {state.reason or f'ended with exit code {code}'}; see {run.log_path}")
        return lines

    @contextmanager
    def stopping_on_error(self, sleep: Callable[[float], None]) -> Iterator[None]:
        """Stop all processes if an error leaves the context: a run could not be started, or a file not be written."""
        try:
            yield
        except (PsannlmError, OSError):
            self.stop(sleep)
            raise

    def stop(self, sleep: Callable[[float], None]) -> None:
        """Ask all processes to save and exit, and wait for them."""
        for _, process, _ in self._active.values():
            process.terminate()
        while any(process.poll() is None for _, process, _ in self._active.values()):
            sleep(_POLL_S)
        self._active.clear()

    def status(self) -> str:
        """Return a status line with the active runs and the remaining time, estimated from operations done so far."""
        active = [run for run, _, _ in self._active.values()]
        steps = [read_status(run).step for run in active]
        left = sum(run.flops_left(self._first[run.name]) for run in self._waiting)
        left += sum(run.flops_left(step) for run, step in zip(active, steps, strict=True))
        done, elapsed = self._all_flops - left, self._clock() - self._began
        time_left = f", about {timedelta(seconds=round(elapsed * left / done))} left" if done > 0 else ""
        pairs = zip(active, steps, strict=True)
        now = ", ".join(f"{run.name} step {step} of {run.variant.n_steps}" for run, step in pairs)
        return f"{self.n_done} of {self._n_runs} runs done; {now}{time_left}"

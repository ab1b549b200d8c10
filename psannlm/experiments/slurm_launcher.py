"""Launcher of a study's runs as Slurm jobs, through submitit, with its files in the study's folder ``slurm/``."""

from __future__ import annotations

import logging
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from psannlm.errors import ConfigError, TrainingError, install_extra, nearest
from psannlm.experiments.local_launcher import branch_off
from psannlm.experiments.model import StudyRun
from psannlm.experiments.slurm_job import TrainingJob
from psannlm.io.atomic import explain_write_errors, read_small
from psannlm.io.readers import Unreadable, read_json
from psannlm.io.run_metadata import write_json
from psannlm.runtime.processes import python_program

log = logging.getLogger(__name__)

SLURM_FOLDER = "slurm"
_JOBS_FILE = "jobs.json"
# The time limit of a job. A run that reaches it saves, is requeued and resumes, so that it may be short.
DEFAULT_MINUTES = 60
# A run may be requeued so often; submitit counts only time limits.
_MAX_REQUEUES = 1_000
_JOBS_BYTES = 16 << 20
_CHECK_S = 2.0
# Slurm kills a cancelled job after 30 s, unless KillWait says otherwise.
_CANCEL_S = 120.0
# The command line of a job is PROGRAM -u -m submitit.core._submit FOLDER: its last word is all that it needs.
_PROGRAM = "sys.argv[1:] = sys.argv[-1:]; from submitit.core.submission import submitit_main; submitit_main()"
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?\Z")
# submitit's own names: those that its executors share, which have a type, and those of its Slurm executor.
_SHARED: dict[str, type] = {"timeout_min": int, "mem_gb": float, "cpus_per_task": int, "gpus_per_node": int}
_OF_SLURM = (
    *("partition", "account", "qos", "constraint", "exclude", "nodelist", "gres", "mem", "mem_per_cpu", "mem_per_gpu"),
    *(
        "cpus_per_gpu",
        "gpus_per_task",
        "comment",
        "dependency",
        "exclusive",
        "mail_type",
        "mail_user",
        "signal_delay_s",
    ),
    *("wckey", "use_srun", "setup", "srun_args"),
)
_ONE = ("nodes", "ntasks", "ntasks_per_node", "tasks_per_node")
_OURS = ("job_name", "name", "output", "error", "array", "array_parallelism", "signal")


def slurm_parameters(settings: Sequence[str], devices: Sequence[str] = ()) -> dict[str, Any]:
    """Return the parameters of submitit's executor for ``--slurm KEY=VALUE`` settings, with defaults.

    A key is an option of sbatch without its dashes (``cpus-per-task`` or ``cpus_per_task``), or a name of submitit's
    (``timeout_min``, ``mem_gb``, ``setup``). If a device is ``cuda``, a job gets one GPU unless a setting names GPUs.

    Raises:
        ConfigError: a setting is not KEY=VALUE, is given twice, misspelled or malformed, or is decided by the study.
    """
    found: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip().lstrip("-").replace("-", "_")
        if not equals or not key or not text.strip():
            raise ConfigError(f"--slurm {setting}: write KEY=VALUE, such as --slurm partition=gpu")
        name, value = _parameter(key, text.strip(), setting)
        place = found if name in (*_SHARED, "nodes") or name.startswith("slurm_") else extra
        if name in place:
            raise ConfigError(f"--slurm {setting}: {key} is given twice")
        place[name] = value
    if extra:
        found["slurm_additional_parameters"] = {name.replace("_", "-"): value for name, value in extra.items()}
    found.setdefault("timeout_min", DEFAULT_MINUTES)
    asks_gpus = any(name.removeprefix("slurm_").startswith(("gpus", "gres")) for name in (*found, *extra))
    if not asks_gpus and any(device.startswith("cuda") for device in devices):
        found["gpus_per_node"] = 1
    return found


def _parameter(key: str, text: str, setting: str) -> tuple[str, Any]:
    """Return submitit's name of a setting, and its value."""
    if key in _ONE:
        if text != "1":
            raise ConfigError(f"--slurm {setting}: a run of a study is one process on one node; leave it out")
        return "nodes", 1
    if key in _OURS:
        raise ConfigError(f"--slurm {setting}: {key.replace('_', '-')} is set by the study; leave it out")
    if key == "time":
        return "timeout_min", _minutes(text, setting)
    if key in _SHARED:
        try:
            return key, _SHARED[key](text)
        except ValueError:
            raise ConfigError(f"--slurm {setting}: {text!r} is not a number") from None
    if key in ("setup", "srun_args"):
        return f"slurm_{key}", [text] if key == "setup" else shlex.split(text)
    value: Any = {"true": True, "false": False}.get(text.lower(), int(text) if text.isdecimal() else text)
    if key in _OF_SLURM:
        return f"slurm_{key}", value
    # Slurm has more options than submitit has names for; those that look like a misspelled one are refused.
    if hint := nearest(key, (*_SHARED, *_OF_SLURM, "time")):
        raise ConfigError(f"--slurm {setting}: unknown key{hint}")
    return key, value


def _minutes(text: str, setting: str) -> int:
    """Return the minutes of a time limit of Slurm's: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    match = _TIME.match(text)
    if match is None:
        raise ConfigError(f"--slurm {setting}: write minutes, HH:MM:SS or D-HH:MM:SS")
    days, *numbers = match.groups()
    parts = [int(number) for number in numbers if number is not None]
    if days is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    total_s = 60 * (60 * (24 * int(days or 0) + hours) + minutes) + seconds
    if total_s < 60:
        raise ConfigError(f"--slurm {setting}: give a minute or more")
    return -(-total_s // 60)


class SlurmLauncher:
    """Submits runs as jobs; a job of an earlier ``compare`` that still waits or runs is taken over.

    Args:
        study: the study's folder, which all nodes must see under the same path.
        parameters: of :func:`slurm_parameters`.
        cluster: submitit's executor; ``local`` runs jobs on this machine, for tests.

    Raises:
        ConfigError: submitit is not installed, or this machine has no Slurm.
    """

    def __init__(self, study: Path, parameters: Mapping[str, Any], cluster: str = "slurm") -> None:
        submitit = _submitit()
        self._folder, self._cluster = study / SLURM_FOLDER, cluster
        try:
            self._executor = submitit.AutoExecutor(
                folder=self._folder.absolute() / "%j",
                cluster=cluster,
                **{
                    f"{cluster}_python": shlex.join(python_program(_PROGRAM)),
                    f"{cluster}_max_num_timeout": _MAX_REQUEUES,
                },
            )
        except RuntimeError:
            raise ConfigError(
                "--launcher slurm: srun is not found; run psannlm compare on a login node of the cluster"
            ) from None
        self._executor.update_parameters(**parameters)

    def __call__(self, run: StudyRun, environment: Mapping[str, str]) -> SlurmProcess:
        """Submit the job of a run. ``environment``, which divides this machine, is not that of a node."""
        jobs = _read_jobs(self._folder / _JOBS_FILE)
        if (job := self._earlier_job(jobs.get(run.name))) is not None:
            log.info("%s: Slurm job %s of an earlier call continues", run.name, job.job_id)
            return SlurmProcess(run.name, job)
        self._executor.update_parameters(name=f"psannlm-{run.name}")
        trunk = branch_off(run)
        files = run.config_path.absolute(), run.log_path.absolute()
        function = TrainingJob(run.name, *files, None if trunk is None else trunk.absolute())
        try:
            with explain_write_errors(self._folder):
                job = self._executor.submit(function)
        except RuntimeError as error:  # of all of submitit's errors
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = next((line for line in lines if "error" in line), lines[0] if lines else "unknown reason")
            raise TrainingError(f"{run.name}: Slurm took no job: {reason:.300}") from error
        write_json(self._folder / _JOBS_FILE, {**jobs, run.name: job.job_id})
        return SlurmProcess(run.name, job)

    def _earlier_job(self, job_id: str | None) -> Any:
        """Return the job of that number if Slurm knows it and it has not ended, else None."""
        if job_id is None or self._cluster != "slurm":
            return None
        job = _submitit().SlurmJob(folder=self._folder.absolute() / "%j", job_id=job_id)
        has_ended = job.done(force_check=True)
        return None if has_ended or job.state == "UNKNOWN" else job


class SlurmProcess:
    """A job of a run, which may wait, be requeued and run again until it ends."""

    def __init__(self, name: str, job: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._job, self._clock = name, job, clock
        self._cancelled_at: float | None = None
        self._checked_at = float("-inf")

    def poll(self) -> int | None:
        """Return None until the job has ended, then 0 or 1; what became of the run is in its files."""
        now = self._clock()
        if now - self._checked_at < _CHECK_S:
            return None
        self._checked_at = now
        # Without force, submitit asks Slurm rarely, and otherwise waits for the job's result.
        if not self._job.done(force_check=self._cancelled_at is not None):
            has_waited = self._cancelled_at is not None and now - self._cancelled_at > _CANCEL_S
            return 1 if has_waited else None
        if self._job.paths.result_pickle.exists():
            return 0
        if self._cancelled_at is None:
            log.warning("%s: Slurm job %s ended as %s", self._name, self._job.job_id, self._job.state)
        return 1

    def terminate(self) -> None:
        """Cancel the job: a waiting one at once, a running one after it has saved."""
        self._cancelled_at, self._checked_at = self._clock(), float("-inf")
        self._job.cancel(check=False)


def _read_jobs(path: Path) -> dict[str, str]:
    """Return the job numbers by run of earlier calls."""
    if read_small(path, _JOBS_BYTES) is None:
        return {}
    try:
        found = read_json(path)
    except Unreadable:
        return {}
    return {name: job for name, job in found.items() if isinstance(job, str)}


def _submitit() -> Any:
    try:
        submitit = import_module("submitit")
    except ImportError:
        raise ConfigError(
            f"--launcher slurm needs the package submitit, which is not installed; {install_extra('cluster')}"
        ) from None
    # Its import configures these handlers, which print to stdout.
    logging.getLogger("submitit").handlers.clear()
    logging.getLogger("submitit").setLevel(logging.ERROR)
    return submitit

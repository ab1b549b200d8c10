"""Runs as Slurm jobs: sbatch options, submitit's executor of this machine, and a Slurm of five shell scripts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from psannlm.config.run import load_config
from psannlm.errors import ConfigError, Interrupted, TrainingError
from psannlm.experiments.gpu_slots import Placement
from psannlm.experiments.launchers import choose_launching
from psannlm.experiments.model import Study
from psannlm.experiments.plan import load_plan
from psannlm.experiments.run_state import read_status
from psannlm.experiments.runner import run_all
from psannlm.experiments.sizing import size_study, write_configs
from psannlm.experiments.slurm_job import TrainingJob
from psannlm.experiments.slurm_launcher import SlurmLauncher, SlurmProcess, slurm_parameters
from psannlm.training.run import train

BASE = """\
model: {{base: transformer, d_model: 16, n_layers: 1, n_heads: 2, mlp: swiglu}}
data:
  sources: [{{path: {corpus}, per_line: true}}]
  tokenizer: simple
  vocab_size: 512
  max_length: 16
  val_split: 0.2
train: {{batch_tokens: 128, amp: fp32, device: cpu, log_interval_steps: 1, sample_prompts: []}}
"""
PLAN = """\
base: base.yaml
budget: {tokens: TOKENS}
learning_rates: [1e-2]
baseline: swiglu
variants: {swiglu: null}
"""


@pytest.fixture
def make(tmp_path: Path, tiny_corpus: Path) -> Callable[..., Study]:
    """Return a builder of studies of one run, in a folder of the given name."""

    def build(folder: str = "study", tokens: int = 700) -> Study:
        (tmp_path / "base.yaml").write_text(BASE.format(corpus=json.dumps(str(tiny_corpus))))
        (tmp_path / "plan.yaml").write_text(PLAN.replace("TOKENS", str(tokens)))
        return size_study(load_plan(tmp_path / "plan.yaml"), tmp_path / folder)

    return build


def losses(study: Study) -> list[tuple[str, int, float]]:
    """Return the loss of every logged step and validation."""
    lines = (study.runs[0].folder / "metrics.jsonl").read_text().splitlines()
    return [(row["kind"], row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row]


def trained_here(study: Study) -> list[tuple[str, int, float]]:
    """Train the run of a study in this process, without interruption, and return its losses."""
    write_configs(study)
    train(load_config(study.runs[0].config_path))
    return losses(study)


@pytest.mark.parametrize(
    ("settings", "devices", "wanted"),
    [
        ([], ["cpu"], {"timeout_min": 60}),
        ([], ["cuda"], {"timeout_min": 60, "gpus_per_node": 1}),
        (["gres=gpu:a100:1"], ["cuda"], {"timeout_min": 60, "slurm_gres": "gpu:a100:1"}),
        (["partition=gpu", "cpus-per-task=4"], [], {"slurm_partition": "gpu", "cpus_per_task": 4, "timeout_min": 60}),
        (["time=4:00:00"], [], {"timeout_min": 240}),
        (["time=1-12"], [], {"timeout_min": 36 * 60}),
        (["time=90"], [], {"timeout_min": 90}),
        (["time=2:30"], [], {"timeout_min": 3}),
        (["mem=16G", "exclusive=true"], [], {"slurm_mem": "16G", "slurm_exclusive": True, "timeout_min": 60}),
        (["setup=module load cuda"], [], {"slurm_setup": ["module load cuda"], "timeout_min": 60}),
        (["reservation=x"], [], {"timeout_min": 60, "slurm_additional_parameters": {"reservation": "x"}}),
        (["nodes=1"], [], {"timeout_min": 60, "nodes": 1}),
    ],
)
def test_slurm_settings_become_job_parameters(settings: list[str], devices: list[str], wanted: dict[str, Any]) -> None:
    assert slurm_parameters(settings, devices) == wanted


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["partition"], "write KEY=VALUE"),
        (["partition="], "write KEY=VALUE"),
        (["partion=gpu"], "unknown key .did you mean 'partition'"),
        (["time=soon"], "write minutes, HH:MM:SS or D-HH:MM:SS"),
        (["time=0:30"], "give a minute or more"),
        (["cpus_per_task=many"], "'many' is not a number"),
        (["nodes=2"], "one process on one node"),
        (["output=x"], "set by the study"),
        (["mem=1G", "mem=2G"], "given twice"),
    ],
)
def test_slurm_settings_refuse_what_cannot_be(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        slurm_parameters(settings)


@pytest.mark.parametrize(
    ("launcher", "device", "options", "words"),
    [
        ("local", "cpu", {"slurm": ["mem=1G"]}, "--slurm mem=1G needs --launcher slurm"),
        ("slurm", "auto", {"gpus": "0"}, "--gpus 0: Slurm assigns GPUs"),
        ("slurm", "auto", {"share_gpus": True}, "--share-gpus: Slurm assigns GPUs"),
        ("slurm", "cuda:1", {}, "train.device: cuda:1"),
    ],
)
def test_launcher_refuses_options_of_the_other(launcher: str, device: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_launching(launcher, [device], **options)


def test_slurm_without_submitit_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"needs the package submitit.*\[cluster\]"):
        SlurmLauncher(tmp_path, {})


def test_slurm_launcher_needs_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="srun is not found; run psannlm compare on a login node"):
        SlurmLauncher(tmp_path, {})


class Job:
    """A job that never ends, whatever is asked of it."""

    job_id = "7"
    state = "RUNNING"

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def done(self, force_check: bool = False) -> bool:
        self.asked.append(force_check)
        return False

    def cancel(self, check: bool = True) -> None:
        pass


def test_cancelled_job_is_not_awaited_forever() -> None:
    now = 0.0
    job = Job()
    process = SlurmProcess("run", job, clock=lambda: now)
    assert process.poll() is None
    assert process.poll() is None
    assert job.asked == [False], "Slurm is asked every few seconds, not at every call"
    process.terminate()
    while process.poll() is None:
        now += 0.2
        assert now < 200
    assert 100 < now
    assert set(job.asked[1:]) == {True}


def child_of(pid: int) -> int | None:
    """Return the first child of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None


def wait_for(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Return the first true result of ``what``."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


# It trains for four seconds without a signal, counts on from what it saved, and saves at SIGTERM only.
COUNTER = """
import signal, sys, time
from pathlib import Path
saved, log = map(Path, sys.argv[1:])
count, stop = int(saved.read_text()) if saved.exists() else 0, []
signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
with open(log, "a") as file:
    print("from", count, file=file, flush=True)
    while count < 40 and not stop:
        time.sleep(0.1)
        count += 1
        print(count, file=file, flush=True)
saved.write_text(str(count))
sys.exit(130 if stop else 0)
"""


class CountingJob(TrainingJob):
    """A job whose training only counts."""

    def _start(self, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-S", "-c", COUNTER, str(self._config), str(self._log_path)])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
def test_requeued_job_resumes_where_it_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like Slurm before a time limit, the test signals every process of the job."""
    pytest.importorskip("submitit")
    cloudpickle = pytest.importorskip("cloudpickle")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr("psannlm.experiments.slurm_launcher.TrainingJob", CountingJob)
    monkeypatch.setattr("psannlm.experiments.slurm_launcher._CHECK_S", 0.1)
    run = SimpleNamespace(name="counter", config_path=tmp_path / "saved", log_path=tmp_path / "log", trunk=None)
    process = SlurmLauncher(tmp_path, {"timeout_min": 5}, cluster="local")(run, {})  # type: ignore[arg-type]
    wait_for(lambda: run.log_path.is_file() and "3\n" in run.log_path.read_text())
    job = child_of(process._job._process.pid)
    assert job is not None
    for pid in (child_of(job), job):
        assert pid is not None
        os.kill(pid, signal.SIGUSR2)
    saved = int(wait_for(lambda: run.config_path.is_file() and run.config_path.read_text()))
    assert wait_for(lambda: {None: False, 0: "ended"}[process.poll()]) == "ended"
    first, second = run.log_path.read_text().split("from ")[1:]
    assert (first.split()[0], first.split()[-1]) == ("0", str(saved))
    assert (second.split()[0], second.split()[-1]) == (str(saved), "40")
    assert 3 <= saved < 40


FAKE_SLURM = {
    # As Slurm does it: the script is copied at submission, and runs later.
    "sbatch": """id=$(($(ls {root}/jobs | wc -l) + 100)); cp "$1" {root}/jobs/$id
        (sleep 0.5; SLURM_JOB_ID=$id SLURM_JOB_NUM_NODES=1 setsid bash {root}/jobs/$id \
            >{root}/$id.out 2>&1; echo COMPLETED >{root}/$id.state) >/dev/null 2>&1 </dev/null &
        grep -q 'partition=none' "$1" && {{ echo 'sbatch: error: invalid partition specified: none' >&2; exit 1; }}
        echo RUNNING >{root}/$id.state; echo "Submitted batch job $id" """,
    "srun": """while [ "${{1#--}}" != "$1" ]; do case $1 in --output|--error) shift;; esac; shift; done
        echo $$ >{root}/$SLURM_JOB_ID.pid; exec "$@" """,
    "scancel": """echo "$1" >>{root}/cancelled; kill -TERM -- -$(ps -o pgid= $(cat {root}/$1.pid) | tr -d ' ')""",
    "sacct": """echo 'JobID|State|NodeList'
        for file in {root}/*.state; do echo "$(basename $file .state)|$(cat $file)|here"; done""",
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a Slurm of shell scripts on the path, and return its folder."""
    pytest.importorskip("submitit")
    root = tmp_path / "cluster"
    (root / "jobs").mkdir(parents=True)
    for name, script in FAKE_SLURM.items():
        (root / name).write_text(f"#!/bin/bash\n{script.format(root=root)}\n")
        (root / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{root}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("psannlm.experiments.slurm_launcher._CHECK_S", 0.1)
    return root


@pytest.mark.slow
def test_ending_compare_cancels_jobs_which_resume(make: Callable[..., Study], cluster: Path) -> None:
    """The losses of two jobs, one of them cancelled, are those of one process on this machine."""
    study = make(tokens=10_000)
    run = study.runs[0]

    def sleep(seconds: float) -> None:
        time.sleep(0.05)
        if (run.folder / "metrics.jsonl").is_file() and read_status(run).step > 2 and not stopped:
            stopped.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    stopped: list[bool] = []
    with pytest.raises(Interrupted):
        run_all(study, launcher=SlurmLauncher(study.folder, {"timeout_min": 7}), sleep=sleep)
    script = (cluster / "jobs" / "100").read_text()
    assert "#SBATCH --time=7\n" in script
    assert f"#SBATCH --job-name=psannlm-{run.name}\n" in script
    assert (cluster / "cancelled").read_text() == "100\n"
    assert read_status(run).state == "stopped"
    run_all(study, placement=Placement(9), launcher=SlurmLauncher(study.folder, {}))
    assert json.loads((study.folder / "slurm" / "jobs.json").read_text()) == {run.name: "101"}
    assert losses(study) == trained_here(make("alone", tokens=10_000))


def test_job_of_earlier_call_is_taken_over(make: Callable[..., Study], cluster: Path) -> None:
    """A login node that goes down leaves its jobs: they are not submitted a second time."""
    study = make()
    (study.folder / "slurm").mkdir(parents=True)
    (study.folder / "slurm" / "jobs.json").write_text(json.dumps({study.runs[0].name: "55"}))
    (cluster / "55.state").write_text("RUNNING\n")
    process = SlurmLauncher(study.folder, {})(study.runs[0], {})
    assert not list((cluster / "jobs").iterdir())
    assert process.poll() is None
    (cluster / "55.state").write_text("NODE_FAIL\n")
    time.sleep(0.1)
    launcher = SlurmLauncher(study.folder, {})
    assert launcher._earlier_job("55") is None, "Slurm knows that it has ended"
    assert launcher._earlier_job("56") is None, "Slurm does not know it"
    assert process.poll() == 1


def test_refused_job_is_one_line(make: Callable[..., Study], cluster: Path) -> None:
    study = make()
    with pytest.raises(TrainingError, match=r"seed1337: Slurm took no job: .*invalid partition specified: none"):
        run_all(study, launcher=SlurmLauncher(study.folder, {"slurm_partition": "none"}))

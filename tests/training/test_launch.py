"""``psannlm train --nproc 2``: output, exit codes and network exposure."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from psannlm.config.run import RunConfig, to_yaml
from psannlm.errors import ConfigError, DeviceError
from psannlm.models.tensorfile import read_tensors
from psannlm.runtime.launch import check_launch, private_store
from psannlm.training.checkpoint import list_checkpoints, read_state
from psannlm.training.metrics import read_metrics
from psannlm.training.run import train

TinyRun = Callable[..., RunConfig]
LIMIT_S = 150
# Read by every Python that starts with this folder on its path: lets one rank fail in its third step.
FAULT = """
import atexit, os, signal, sys, threading, time

def fail_later():
    while getattr(sys.modules.get("psannlm.training.loop"), "run_steps", None) is None:
        time.sleep(0.005)
    loop, calls = sys.modules["psannlm.training.loop"], []
    original = loop.train_step
    def fail(*arguments, **settings):
        calls.append(None)
        if len(calls) == 3:
            if os.environ["FAULT"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("boom")
        return original(*arguments, **settings)
    loop.train_step = fail

if os.environ.get("FAULT") == "end" and "RANK" in os.environ:
    atexit.register(os.abort)
elif "FAULT" in os.environ and os.environ.get("RANK") == "1":
    threading.Thread(target=fail_later, daemon=True).start()
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, its output, and seconds since it was told to stop."""

    code: int
    out: str
    err: str
    seconds: float = 0.0

    @property
    def errors(self) -> list[str]:
        return [
            line for line in self.err.splitlines() if "rror" in line or "Traceback" in line or "interrupted" in line
        ]


def start(config: RunConfig, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start the command line, in a group of its own as a shell would."""
    folder = Path(config.train.checkpoint_dir)
    path = folder.with_name(f"{folder.name}.yaml")
    path.write_text(to_yaml(config), encoding="utf-8")
    command = [sys.executable, "-m", "psannlm", "train", str(path), "--nproc", "2", *arguments]
    setting = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **setting}, start_new_session=True
    )


def end(process: subprocess.Popen[str]) -> Ended:
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks too
        out, err = process.communicate()
        pytest.fail(f"no end after {LIMIT_S} s:\n{out}{err}")
    return Ended(process.returncode, out, err)


@pytest.mark.slow
def test_launch_two_ranks_match_one_process_and_one_prints(tiny_run: TinyRun, tmp_path: Path) -> None:
    def config(name: str, accumulation: int) -> RunConfig:
        settings = {"max_steps": 8, "eval_interval_steps": 4, "save_interval_steps": 4, "sample_prompts": []}
        return tiny_run(device="cpu", **settings, grad_accum_steps=accumulation, checkpoint_dir=str(tmp_path / name))

    done = end(start(config("two", 1), "--json"))
    assert (done.code, done.errors) == (0, [])
    alone = train(config("one", 2))
    told = json.loads(done.out)  # one document, and nothing beside it
    assert (told["steps"], told["parameters"]) == (8, alone.parameters)
    assert alone.best is not None
    assert told["best"]["loss"] == pytest.approx(alone.best["loss"], abs=1e-5)
    for step in range(1, 9):
        assert done.err.count(f"step {step}/8") == 1
    assert done.err.count("on 2 ranks") == 1
    ours, theirs = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    assert [(row["kind"], row["step"]) for row in ours] == [(row["kind"], row["step"]) for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=1e-5)
    for file in ("model.safetensors", "optimizer.safetensors"):
        found, expected = (read_tensors(tmp_path / name / "step_00000008" / file).tensors for name in ("two", "one"))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # Adam divides by the root of tiny second moments: the order of a float32 sum, which differs between
            # processors, comes to some 2e-5 after eight steps; gradients that are not shared come to over 1e-3.
            torch.testing.assert_close(found[name], value, atol=5e-5, rtol=0, msg=name)
    with pytest.raises(AssertionError):  # and the same figures are no accident of a run that hardly moved
        torch.testing.assert_close(
            read_tensors(tmp_path / "one" / "step_00000008" / "model.safetensors").tensors["embedding.weight"],
            read_tensors(tmp_path / "one" / "step_00000004" / "model.safetensors").tensors["embedding.weight"],
            atol=1e-3,
            rtol=0,
        )


@pytest.mark.slow
def test_leave_group_skips_interpreter_finalization(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Threads of the process group live on into it, and abort now and then; here, always. All is told and saved."""
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(FAULT, encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(tmp_path / "fault"), os.environ.get("PYTHONPATH"))))
    config = tiny_run(device="cpu", max_steps=2, sample_prompts=[], checkpoint_dir=str(tmp_path / "run"))
    done = end(start(config, "--json", PYTHONPATH=path, FAULT="end"))
    assert done.code == 0, done.err
    assert json.loads(done.out)["steps"] == 2
    assert read_state(tmp_path / "run" / "step_00000002").step == 2


@pytest.mark.slow
def test_launch_exit_code_and_message_per_ending(tiny_run: TinyRun, tmp_path: Path) -> None:
    """A rank that raises, one that is killed, all that fail alike, and a command that is told to stop."""
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(FAULT, encoding="utf-8")
    place = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "fault"), os.environ.get("PYTHONPATH", "")])}

    def config(name: str, **settings: Any) -> RunConfig:
        return tiny_run(
            device="cpu", max_steps=6, save_interval_steps=2, checkpoint_dir=str(tmp_path / name), **settings
        )

    stopped = config("stopped").model_copy(
        update={"train": config("stopped").train.model_copy(update={"max_steps": 1_000_000, "epochs": 1_000_000})}
    )
    running = {
        "raised": start(config("raised"), FAULT="raise", **place),
        "killed": start(config("killed"), FAULT="kill", **place),
        "all": start(config("all", lr=1e30, grad_clip=None, warmup_steps=0)),
        "stopped": start(stopped),
    }
    deadline = time.monotonic() + LIMIT_S
    while len(read_metrics(tmp_path / "stopped")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    told_at = time.monotonic()
    running["stopped"].send_signal(signal.SIGTERM)
    ended = {"stopped": end(running.pop("stopped"))}
    assert time.monotonic() - told_at < 10
    ended |= {name: end(process) for name, process in running.items()}
    assert {name: each.code for name, each in ended.items()} == {"raised": 1, "killed": 1, "all": 1, "stopped": 130}
    boom = "unexpected ValueError: boom (run again with --debug for the traceback)"
    assert ended["raised"].errors == [f"error: rank 1: {boom}"]
    assert ended["killed"].errors == ["error: rank 1 was killed by SIGKILL; the others were stopped"]
    (said,) = ended["all"].errors  # by the first of them to say it
    assert re.match(r"error: (rank 1: )?step \d: loss .* not finite", said)
    assert ended["stopped"].errors == []
    assert ended["stopped"].err.count("run the same command to resume") == 1
    for name in ("raised", "killed"):
        assert [read_state(path).step for path in list_checkpoints(tmp_path / name)] == [2]
    (last,) = list_checkpoints(tmp_path / "stopped")[-1:]
    assert read_state(last).step == read_metrics(tmp_path / "stopped")[-1]["step"]


def listening(group: int) -> list[str]:
    """The addresses on which the ranks that process ``group`` started listen, from the system's own tables."""
    inodes = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            handles = list((folder / "fd").iterdir()) if group in (parent, int(folder.name)) else []
        except OSError:
            continue  # it has ended
        for handle in handles:
            # One that was closed meanwhile says nothing about the others.
            with suppress(OSError):
                inodes.add(os.readlink(handle))
    rows = [row.split() for table in ("tcp", "tcp6") for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]


def endless(config: RunConfig) -> RunConfig:
    return config.model_copy(
        update={"train": config.train.model_copy(update={"max_steps": 1_000_000, "epochs": 1_000_000})}
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_launch_ranks_listen_on_loopback_and_save_on_hangup(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Seen all the way from their start; then the terminal is gone, and what was trained is not."""
    config = tiny_run(device="cpu", save_interval_steps=1_000_000, checkpoint_dir=str(tmp_path / "run"))
    process = start(endless(config))
    deadline, seen = time.monotonic() + LIMIT_S, set()
    while len(read_metrics(tmp_path / "run")) < 3:
        assert time.monotonic() < deadline
        seen |= set(listening(process.pid))
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    done = end(process)
    assert seen == {"0100007F"}  # 127.0.0.1: gloo's, and no other port
    assert (done.code, done.errors) == (130, [])
    (last,) = list_checkpoints(tmp_path / "run")[-1:]
    assert read_state(last).step == read_metrics(tmp_path / "run")[-1]["step"]


@pytest.mark.slow
def test_launch_passes_configuration_from_pipe(tiny_run: TinyRun, tmp_path: Path) -> None:
    config = tiny_run(device="cpu", max_steps=2, sample_prompts=[], checkpoint_dir=str(tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, "-m", "psannlm", "train", "/dev/stdin", "--nproc", "2", "--json"],
        input=to_yaml(config),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2


def test_launch_without_loopback_interface_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", mock.Mock(side_effect=OSError("Network is unreachable")))
    with pytest.raises(DeviceError, match="loopback interface, which is down"), private_store(2):
        pass


def test_check_launch_refuses_impossible_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    check_launch(1, "cpu")
    check_launch(7, "cpu")
    with pytest.raises(ConfigError, match="--nproc 0"):
        check_launch(0, "cpu")
    with pytest.raises(ConfigError, match=r"train\.device cuda:1 is one GPU for 2 ranks"):
        check_launch(2, "cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_launch(2, "auto")
    check_launch(3, "cpu")
    with pytest.raises(DeviceError, match="--nproc 3 needs 3 GPUs, and there are 2; use --nproc 2"):
        check_launch(3, "auto")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="torchrun has started this process"):
        check_launch(2, "cpu")


def test_launcher_of_ranks_on_cpu_loads_no_torch() -> None:
    program = (
        "import sys; from psannlm.runtime.launch import check_launch, launch; check_launch(2, 'cpu'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("family", "address", "shown"),
    [
        (socket.AF_INET, "0.0.0.0", "00000000"),
        (socket.AF_INET, "127.0.0.1", "0100007F"),
        (socket.AF_INET6, "::", "0" * 32),
    ],
)
def test_port_scan_detects_listener_on_every_interface(family: int, address: str, shown: str) -> None:
    """A store of ranks that listened to the network would be seen, in the process itself and in one it started."""
    try:
        server = socket.create_server((address, 0), family=family)
    except OSError:
        pytest.skip(f"there is no {address} to listen on")
    with server:
        assert shown in listening(os.getpid())
        child = subprocess.Popen(["sleep", "30"], pass_fds=(server.fileno(),))
        server.close()
        try:
            assert shown in listening(os.getpid())
            assert listening(child.pid) == [shown]
        finally:
            child.kill()
            child.wait()
    assert listening(child.pid) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_port_scan_detects_torch_store(tmp_path: Path) -> None:
    """The store that is unsafe, TCPStore, listens on every interface; ours is a folder and listens nowhere."""
    before = listening(os.getpid())
    store = torch.distributed.TCPStore("localhost", 0, 1, is_master=True, wait_for_workers=False)
    found = [address for address in listening(os.getpid()) if address not in before]
    assert set(found) & {"00000000", "0" * 32}
    del store

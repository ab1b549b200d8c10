"""A run killed at any moment resumes to the same bits; a stopped run saves and resumes bit for bit.

A process is killed at random moments and started again, until it has been killed often enough; then it is left in
peace. Two kinds of moments: after a random time; and within a save, between any two lines of what saves. By default
each attempt is a fork of one process that has imported everything. With ``PSANNLM_KILLS=100`` in the environment each
is a process of its own, ``python -m psannlm train`` or the same under a trace, killed so many times; it takes minutes.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from psannlm.config.run import config_from_mapping, load_config, to_yaml
from psannlm.errors import EXIT_INTERRUPTED, Interrupted
from psannlm.runtime.log import receiving_messages
from psannlm.training import checkpoint as checkpoint_module
from psannlm.training.checkpoint import latest_valid_checkpoint, list_checkpoints, read_state
from psannlm.training.metrics import read_metrics
from psannlm.training.run import train

pytestmark = pytest.mark.usefixtures("_no_curve")

IN_FULL = int(os.environ.get("PSANNLM_KILLS", "0"))
N_KILLS = IN_FULL or 40
N_STOPS = 12
FILES = ("model.safetensors", "optimizer.safetensors")
STEPS = 24
# Exit codes of a fork: an error; and a Ctrl-C that came before training began.
BROKEN, NOTHING_TO_SAVE = 70, 71
# What is traced within a save: the lines of these modules, each of which is a moment to be killed at.
SAVING = ("checkpoint.py", "storage.py", "tensorfile.py", "artifact.py")
ROOT = Path(checkpoint_module.__file__).parents[1]


def die_within_a_save(save: int, line: int) -> None:
    """Let this process kill itself at line number ``line`` of its save number ``save``, both counted from 1."""
    saves = lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal saves, lines
        path = Path(frame.f_code.co_filename)
        if path.name not in SAVING or ROOT not in path.parents:
            return None
        if event == "call" and frame.f_code.co_name == "save_checkpoint":
            saves += 1
            lines = 0
        if event == "line" and saves == save:
            lines += 1
            if lines == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


@dataclass
class Attempts:
    """What became of the processes: how each ended, and how many were killed in which way."""

    config: Path
    ends: Counter[int] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)

    def start(self, moment: tuple[int, int] | None = None) -> int:
        """Start a run in a fork of this process and return its id; ``moment`` is a save and a line to die at."""
        # A signal that comes before the fork stands within its own try would end up in pytest's.
        former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        child = os.fork()
        if child:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
            return child
        code = BROKEN
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
            if moment is not None:
                die_within_a_save(*moment)
            train(load_config(self.config))
            code = 0
        except Interrupted:
            code = EXIT_INTERRUPTED
        except KeyboardInterrupt:
            code = NOTHING_TO_SAVE
        except BaseException:
            self.said.write_text(traceback.format_exc(), encoding="utf-8")
            raise
        finally:
            os._exit(code)

    def wait(self, child: int) -> int:
        """Return the exit code of a child, or minus the signal that ended it."""
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        self.ends[code] += 1
        assert code != BROKEN, self.said.read_text(encoding="utf-8")
        return code

    @property
    def said(self) -> Path:
        return self.config.with_name("said.txt")

    def wait_for_training(self, child: int) -> None:
        """A fork is in its first step soon enough."""

    def stop_after(self, seconds: float, number: int, name: str) -> bool:
        """Send signal ``number`` to a run after a time; return whether it came before the run's own end."""
        child = self.start()
        self.wait_for_training(child)
        time.sleep(seconds)
        os.kill(child, number)
        is_stopped = self.wait(child) in (-number, EXIT_INTERRUPTED, NOTHING_TO_SAVE)
        self.kills[name] += is_stopped
        return is_stopped

    def kill_within_a_save(self, rng: random.Random, n_lines: int) -> bool:
        """Kill a run at a random line of its first or second save; return whether it got as far."""
        child = self.start((rng.randint(1, 2), rng.randint(1, n_lines)))
        is_killed = self.wait(child) == -signal.SIGKILL
        self.kills["within a save"] += is_killed
        return is_killed


@dataclass
class AttemptsInFull(Attempts):
    """The same with a process of its own for each: ``python -m psannlm train`` from the start."""

    children: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, moment: tuple[int, int] | None = None) -> int:
        command = [sys.executable, "-m", "psannlm", "train", str(self.config)]
        if moment is not None:
            command = [sys.executable, __file__, str(self.config), *map(str, moment)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.said, "wb") as said:
            child = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        self.children[child.pid] = child
        return child.pid

    def wait(self, child: int) -> int:
        """As for a fork; what a process said that ended in another way than those expected is shown."""
        code = self.children.pop(child).wait()
        self.ends[code] += 1
        assert code in (0, -signal.SIGKILL), self.said.read_text(encoding="utf-8")
        return code

    def wait_for_training(self, child: int) -> None:
        """Imports take most of a process's time: wait for the line before the first step, but for one in ten."""
        while child % 10 and b" parameters; " not in self.said.read_bytes():
            time.sleep(0.002)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def assert_as_left_in_peace(folder: Path, straight: Path) -> None:
    """The same bits at the end, and the same log, each step once."""
    assert contents(folder / f"step_{STEPS:08d}") == contents(straight / f"step_{STEPS:08d}")
    rows, expected = (
        [{k: v for k, v in row.items() if k not in ("tokens_per_s", "peak_memory_bytes")} for row in read_metrics(run)]
        for run in (folder, straight)
    )
    assert rows == expected
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, STEPS + 1))
    assert list(folder.glob(".*")) == []


def config_in(folder: Path, corpus: Path) -> Path:
    """Write a configuration whose run is in ``folder/run``: dropout, accumulation, epochs of six steps."""
    settings = {
        "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "d_mlp": 24, "dropout": 0.2},
        "data": {"sources": [{"path": str(corpus), "per_line": True}], "tokenizer": "simple", "vocab_size": 512},
        "train": {"max_steps": STEPS, "batch_tokens": 128, "grad_accum_steps": 2, "lr": 1e-2, "amp": "fp32"},
    }
    settings["data"] |= {"max_length": 16, "val_split": 0.2}
    settings["train"] |= {"save_interval_steps": 2, "eval_interval_steps": 6, "log_interval_steps": 1}
    settings["train"] |= {"device": "cpu", "sample_prompts": [], "checkpoint_dir": str(folder / "run")}
    folder.mkdir()
    path = folder / "config.yaml"
    path.write_text(to_yaml(config_from_mapping(settings)), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Straight:
    """A run left in peace: its folder, how long it took, and how many lines a save goes through."""

    folder: Path
    seconds: float
    lines: int


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Straight:
    config = load_config(config_in(tmp_path_factory.mktemp("kills") / "straight", tiny_corpus))
    counted, n_saves = 0, 0

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal counted, n_saves
        path = Path(frame.f_code.co_filename)
        if path.name not in SAVING or ROOT not in path.parents:
            return None
        n_saves += event == "call" and frame.f_code.co_name == "save_checkpoint"
        counted += event == "line" and n_saves == 2
        return count

    folder = train(config).folder
    began = time.monotonic()
    train(config, resume="never")
    seconds = time.monotonic() - began
    former = sys.gettrace()
    sys.settrace(count)
    try:
        train(config, resume="never")
    finally:
        sys.settrace(former)
    return Straight(folder, seconds, counted)


@pytest.mark.slow
def test_killed_run_resumes_to_identical_bits(tmp_path: Path, tiny_corpus: Path, straight: Straight) -> None:
    """Three in ten times within a save; as many runs as that takes, each compared at its end."""
    n_kills, n_within = N_KILLS, round(0.3 * N_KILLS)
    rng = random.Random(5)
    kind = AttemptsInFull if IN_FULL else Attempts
    kills: Counter[str] = Counter()
    whole_runs = 0
    while kills.total() < n_kills:
        attempts = kind(config_in(tmp_path / f"killed_{whole_runs}", tiny_corpus))
        folder = attempts.config.parent / "run"
        is_done = False
        while not is_done and kills.total() + attempts.kills.total() < n_kills:
            n_timed = kills["at a time"] + attempts.kills["at a time"]
            n_saved = kills["within a save"] + attempts.kills["within a save"]
            is_within = n_saved < n_within and (n_timed >= n_kills - n_within or rng.random() < 0.3)
            if is_within:
                is_done = not attempts.kill_within_a_save(rng, straight.lines)
            else:
                seconds = rng.uniform(0, 0.6 * straight.seconds)
                is_done = not attempts.stop_after(seconds, signal.SIGKILL, "at a time")
            with receiving_messages(pytest.fail):
                found = latest_valid_checkpoint(folder)  # a damaged one would be told
            assert found is None or found[1].step <= STEPS
        if not is_done:
            assert attempts.wait(attempts.start()) == 0
        assert set(attempts.ends) <= {0, -signal.SIGKILL}
        assert_as_left_in_peace(folder, straight.folder)
        kills += attempts.kills
        whole_runs += 1
    assert kills == {"at a time": n_kills - n_within, "within a save": n_within}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_run_saves_and_resumes(tmp_path: Path, tiny_corpus: Path, straight: Straight, number: int) -> None:
    """What was stopped while training ends with 130 and a checkpoint of the step it was in."""
    attempts = Attempts(config_in(tmp_path / "stopped", tiny_corpus))
    folder = attempts.config.parent / "run"
    rng = random.Random(number)
    is_done, told = False, 0
    while not is_done and told < N_STOPS:
        before = newest_step(folder)
        is_done = not attempts.stop_after(rng.uniform(0, 0.3 * straight.seconds), number, "stopped")
        if attempts.ends[EXIT_INTERRUPTED] > told:
            told += 1
            rows = [row["step"] for row in read_metrics(folder) if row["kind"] == "train"]
            assert newest_step(folder) == max(rows) > before
    if not is_done:
        assert attempts.wait(attempts.start()) == 0
    # A signal before training begins ends the process there and then: there is nothing to save yet.
    assert set(attempts.ends) <= {0, EXIT_INTERRUPTED, NOTHING_TO_SAVE, -number}
    assert_as_left_in_peace(folder, straight.folder)


def newest_step(folder: Path) -> int:
    return max((read_state(path).step for path in list_checkpoints(folder)), default=0)


if __name__ == "__main__":
    from psannlm.commands.app import main

    die_within_a_save(int(sys.argv[2]), int(sys.argv[3]))
    main(["train", sys.argv[1]])

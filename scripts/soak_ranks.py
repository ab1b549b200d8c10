"""Soak test of training on several ranks: kill random ranks, check that all end soon and resume to the same bits.

Each attempt starts the ranks of ``psannlm train`` on a tiny model and kills one of them with SIGKILL: within a save,
within a step, or at a random time after it has joined. The other ranks must end within ``--limit`` seconds, and one
line must name the killed rank. The same command then resumes. When a run has reached its last step, the tensors of its
checkpoint must equal, bit for bit, those of a run without kills. Such runs are repeated, in each mode of
``train.fsdp``, until ``--kills`` ranks were killed; then the figures are printed.

Ranks are forks of one process that has imported everything, and no launcher watches them: they must notice by
themselves. A kill takes some ten seconds, most of them idle, so that several commands with different ``--seed`` can run
at the same time. Linux and macOS only.

    python scripts/soak_ranks.py --kills 300
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODES = ("off", "full", "hybrid")
STEPS, STEPS_PER_SAVE = 24, 3
LIMIT_S = 30.0
# A run without a kill that takes longer than this hangs.
HANG_S = 300.0
# Kinds of kills and the fraction of each; and the function of the training loop in which a rank kills itself.
RANDOM = "at a random time"
KINDS = {"within a save": 0.4, "within a step": 0.3, RANDOM: 0.3}
FUNCTIONS = {"within a save": "_save", "within a step": "train_step"}
# Seconds into the function at which it does, at most.
WITHIN_S = 0.02
LIBRARIES = (
    "matplotlib.backends.backend_agg",
    "torch._dynamo",
    "torch.distributed.checkpoint.default_planner",
    "torch.distributed.checkpoint.hf_storage",
    "torch.distributed.fsdp",
    "psannlm.commands.app",
    "psannlm.generation.generate",
    "psannlm.training.run",
)
# Lines that gloo writes to stderr by itself.
_GLOO_LOG = re.compile(r"\[(/\S*/gloo/|E\d+ \S+ ProcessGroupGloo)")
# Exit code of a fork whose code failed before or after the command.
BROKEN = 70


@dataclass
class Ranks:
    """Forked processes of this one, one per rank, and the file that each writes its output to."""

    pids: list[int]
    outputs: list[Path]
    codes: dict[int, int] = field(default_factory=dict)

    def wait(self, until_s: float) -> bool:
        """Wait until all ranks have ended, or for ``until_s`` seconds; return whether they have."""
        deadline = time.monotonic() + until_s
        while len(self.codes) < len(self.pids) and time.monotonic() < deadline:
            for rank, pid in enumerate(self.pids):
                if rank not in self.codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    self.codes[rank] = os.waitstatus_to_exitcode(found[1])
            time.sleep(0.01)
        return len(self.codes) == len(self.pids)

    def kill(self) -> None:
        """Kill the ranks that still run."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                os.kill(pid, signal.SIGKILL)
        self.wait(LIMIT_S)

    def errors(self) -> list[list[str]]:
        """Return the lines of each rank that report an error; gloo's log of its own connections is none of them."""
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in self.outputs]
        return [
            [line for line in text.splitlines() if re.search("rror|Traceback", line) and not _GLOO_LOG.match(line)]
            for text in texts
        ]


def fork_ranks(n_ranks: int, folder: Path, place: dict[str, str], work: Callable[[int], Any]) -> Ranks:
    """Start ``work(rank)`` in ``n_ranks`` forks of this process, as a launcher would place them.

    Args:
        folder: of the outputs.
        place: environment variables of ``psannlm.runtime.launch.private_store``.
    """
    outputs = [folder / f"rank_{rank}.log" for rank in range(n_ranks)]
    pids = []
    for rank, output in enumerate(outputs):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = BROKEN
        try:
            with open(output, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.environ |= {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            work(rank)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else BROKEN
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return Ranks(pids, outputs)


def has_joined(place: dict[str, str], rank: int) -> bool:
    """Whether a rank has given its first sign of life to the others, who could not miss it before."""
    from psannlm.runtime.launch import STORE_FOLDER

    return any(Path(place[STORE_FOLDER]).glob(f"*alive%2F{rank}"))


@dataclass(frozen=True)
class SelfKill:
    """A rank that kills itself: ``after_s`` seconds into call ``call``, from 0, of a function of the training loop."""

    rank: int
    function: str
    call: int
    after_s: float

    def prepare(self) -> None:
        """Let this process kill itself when it gets there."""
        from psannlm.training import loop

        original, calls = getattr(loop, self.function), []

        def call_and_kill(*arguments: Any, **settings: Any) -> Any:
            calls.append(None)
            if len(calls) == self.call + 1:
                threading.Timer(self.after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return original(*arguments, **settings)

        setattr(loop, self.function, call_and_kill)


def import_libraries() -> None:
    """Import what the ranks use, once and before the forks: it takes longer than their runs."""
    for name in LIBRARIES:
        importlib.import_module(name)


@dataclass
class Soak:
    """The runs of one mode of ``train.fsdp`` and what became of them."""

    folder: Path
    mode: str
    n_ranks: int
    n_steps: int
    limit_s: float
    rng: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    n_runs: int = 0
    expected: dict[str, str] = field(default_factory=dict)
    straight_s: float = 0.0

    def config(self, name: str) -> Path:
        """Write the configuration of a run to ``name`` in the folder and return its path."""
        from psannlm.config.run import config_from_mapping, to_yaml

        sharding = {"shard_size": self.n_ranks // 2} if self.mode == "hybrid" else {}
        settings = {
            "model": {"base": "waveresnet", "d_model": 16, "n_layers": 2, "n_heads": 2, "d_mlp": 24, "dropout": 0.1},
            "data": {
                "sources": [{"path": str(self.folder / "text.txt"), "per_line": True}],
                "tokenizer": "simple",
                "vocab_size": 300,
                "max_length": 16,
                "val_split": 0.1,
            },
            "train": {
                "max_steps": self.n_steps,
                "batch_tokens": 32,
                "grad_accum_steps": 2,
                "lr": 1e-2,
                "amp": "fp32",
                "save_interval_steps": STEPS_PER_SAVE,
                "eval_interval_steps": 8,
                "log_interval_steps": 1,
                "device": "cpu",
                "sample_prompts": [],
                "fsdp": self.mode,
                **sharding,
                "checkpoint_dir": str(self.folder / name / "run"),
            },
        }
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        path = self.folder / name / "config.yaml"
        path.write_text(to_yaml(config_from_mapping(settings)), encoding="utf-8")
        return path

    def start(self, config: Path, place: dict[str, str], self_kill: SelfKill | None = None) -> Ranks:
        """Start the ranks of a run, one of which may kill itself."""
        from psannlm.commands.app import main

        def work(rank: int) -> None:
            if self_kill is not None and rank == self_kill.rank:
                self_kill.prepare()
            main(["train", str(config)])

        return fork_ranks(self.n_ranks, config.parent, place, work)

    def run_in_peace(self) -> None:
        """Make the run whose files every killed one must equal."""
        began = time.monotonic()
        self._finish(self.config("straight"))
        self.straight_s = time.monotonic() - began
        self.expected = self._hashes("straight")

    def run_killed(self, n_kills: int) -> None:
        """Make one run that is killed up to ``n_kills`` times, and check it at its end."""
        name = f"killed_{self.n_runs}"
        config = self.config(name)
        for _ in range(n_kills):
            if not self._kill_once(config):
                break
        else:
            self._finish(config)
        found = self._hashes(name)
        if found != self.expected:
            raise SystemExit(f"fsdp {self.mode}: {name} differs from the run left in peace: {found} {self.expected}")
        self.n_runs += 1

    def _kill_once(self, config: Path) -> bool:
        """Start the run and kill a rank of it; return whether it was killed before the end of the run."""
        from psannlm.runtime.launch import private_store

        # The kind that is furthest behind its fraction.
        kind = min(KINDS, key=lambda kind: (self.kills[kind] + 1) / KINDS[kind])
        rank, call = self.rng.randrange(self.n_ranks), self.rng.randrange(3)
        after_s = self.rng.uniform(0, self.straight_s if kind == RANDOM else WITHIN_S)
        self_kill = None if kind == RANDOM else SelfKill(rank, FUNCTIONS[kind], call, after_s)
        with private_store(self.n_ranks) as place:
            ranks = self.start(config, place, self_kill)
            try:
                if self_kill is None:
                    while not has_joined(place, rank) and not ranks.wait(0.01):
                        pass
                    ranks.wait(after_s)
                    if rank not in ranks.codes:
                        os.kill(ranks.pids[rank], signal.SIGKILL)
                waited = Ranks([ranks.pids[rank]], [])
                if rank in ranks.codes:
                    waited.codes[0] = ranks.codes[rank]
                elif not waited.wait(HANG_S):
                    raise SystemExit(f"fsdp {self.mode}: rank {rank} neither died nor ended: {ranks.errors()}")
                ranks.codes[rank] = waited.codes[0]
                died = time.monotonic()
                has_ended = ranks.wait(self.limit_s)
                seconds = time.monotonic() - died
            finally:
                ranks.kill()
        codes, errors = ranks.codes, ranks.errors()
        if codes[rank] == 0 and has_ended and not any(codes.values()):
            return False
        others = {code for other, code in codes.items() if other != rank}
        # A rank that dies in the very last moments leaves ranks that are done.
        if not has_ended or codes[rank] != -signal.SIGKILL or not others <= {0, 1}:
            raise SystemExit(f"fsdp {self.mode}: after a kill of rank {rank}: {has_ended=}, {codes=}, {errors=}")
        reports = [line for lines in errors for line in lines]
        if 1 in others and (len(reports) != 1 or f"rank {rank}: gone" not in reports[0]):
            raise SystemExit(f"fsdp {self.mode}: rank {rank} was killed, and the ranks reported {reports}")
        self.seconds.append(seconds)
        self.kills[kind] += 1
        return True

    def _finish(self, config: Path) -> None:
        from psannlm.runtime.launch import private_store

        with private_store(self.n_ranks) as place:
            ranks = self.start(config, place)
            has_ended = ranks.wait(HANG_S)
            ranks.kill()
        if not has_ended or any(ranks.codes.values()):
            raise SystemExit(f"fsdp {self.mode}: {config.parent.name} was not finished: {ranks.codes} {ranks.errors()}")

    def _hashes(self, name: str) -> dict[str, str]:
        """Return the hash of every tensor of the last checkpoint: the headers of shards have no fixed order."""
        import torch

        from psannlm.models.tensorfile import read_tensors

        last = self.folder / name / "run" / f"step_{self.n_steps:08d}"
        return {
            f"{file.name}: {name}": hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
            for file in sorted(last.glob("*.safetensors"))
            for name, tensor in read_tensors(file).tensors.items()
        }


def write_text(path: Path, rng: random.Random) -> None:
    """Write a small text of random words."""
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(60)]
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(300)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line, kill ranks, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="number of ranks to kill, over all modes (default 300)")
    parser.add_argument("--ranks", type=int, default=4, help="processes of each run (default 4)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of each run (default {STEPS})")
    parser.add_argument("--modes", default=",".join(MODES), help=f"values of train.fsdp (default {','.join(MODES)})")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help=f"seconds to end in (default {LIMIT_S:.0f})")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kills (default 0)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: forks of a process with threads would hang
    import_libraries()
    with tempfile.TemporaryDirectory(prefix="psannlm-soak-") as folder:
        figures = soak(asked, Path(folder))
    if asked.json:
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    for name, value in figures.items():
        sys.stdout.write(f"{name}: {value}\n")


def soak(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Kill ranks as ``asked`` and return the figures. Raises SystemExit with the finding if a law does not hold."""
    rng = random.Random(asked.seed)
    parts = []
    for mode in asked.modes.split(","):
        (folder / mode).mkdir()
        write_text(folder / mode / "text.txt", rng)
        parts.append(Soak(folder / mode, mode, asked.ranks, asked.steps, asked.limit, rng))
        parts[-1].run_in_peace()
    while (left := asked.kills - sum(part.kills.total() for part in parts)) > 0:
        part = min(parts, key=lambda part: part.kills.total())
        part.run_killed(min(left, rng.randint(2, 8)))
    seconds = [value for part in parts for value in part.seconds]
    return {
        "ranks killed": sum(part.kills.total() for part in parts),
        "of them": {part.mode: dict(part.kills) for part in parts},
        "runs, each equal to one left in peace": sum(part.n_runs for part in parts),
        "seconds until all ranks had ended, median": round(statistics.median(seconds), 1),
        "seconds until all ranks had ended, most": round(max(seconds), 1),
    }


if __name__ == "__main__":
    main()

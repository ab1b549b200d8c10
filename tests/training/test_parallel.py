"""DDP and FSDP train the model of a single process, and all ranks end if one fails."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.config.run import RunConfig, config_from_mapping, to_yaml
from psannlm.models.tensorfile import read_tensors
from psannlm.training.checkpoint import OPTIMIZER_FILE, read_state, step_folder
from psannlm.training.metrics import read_metrics
from psannlm.training.run import train
from psannlm.training.run_folder import read_run_status

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("rank_script.py")
N_STEPS, HALF = 20, 10
LIMIT_S = 310
LOW = ("bf16", "fp16")
# Every third window has a border of documents.
PACKED = {"data": {"pack_sequences": True, "max_length": 48}, "batch_tokens": 48 * 2}
ISOLATED = {**PACKED, "data": {**PACKED["data"], "isolate_documents": True}}
# Unpacked, so that windows hold 1 to 12 labels; with accumulation, validation, and epochs that end unevenly.
SHARED: dict[str, Any] = {
    "max_steps": N_STEPS,
    "batch_tokens": 12 * 3,
    "lr": 3e-3,
    "amp": "fp32",
    "device": "cpu",
    "log_interval_steps": 1,
    "eval_interval_steps": HALF,
    "save_interval_steps": HALF,
    "keep_checkpoints": 9,
}


@dataclass(frozen=True)
class Rank:
    """How a rank ended: its exit code (below zero: a signal), the time, and what it said."""

    code: int
    ended: float
    out: str
    err: str


class Launcher:
    """Starts ranks as a launcher would, but as forks of one process: loading torch takes longer than their runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pipe, environment = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT)], stdin=pipe, stdout=pipe, text=True, env=environment, start_new_session=True
        )

    def run(self, *launches: tuple[list[str], int]) -> list[list[Rank]]:
        """Run the ranks of all launches, each arguments and a number of ranks, at once, and return how they ended."""
        asked = [rank for arguments, size in launches for rank in self._ranks(arguments, size)]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        # Each rank ends itself after LIMIT_S, and this is for a rank that cannot.
        timer = threading.Timer(LIMIT_S + 30, os.killpg, (self.process.pid, signal.SIGKILL))
        timer.start()
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        ended = json.loads(self.process.stdout.readline())
        timer.cancel()
        ranks = [
            Rank(code, at, Path(rank["out"]).read_text(encoding="utf-8"), Path(rank["err"]).read_text(encoding="utf-8"))
            for (code, at), rank in zip(ended, asked, strict=True)
        ]
        return [[ranks.pop(0) for _ in range(size)] for _, size in launches]

    def _ranks(self, arguments: list[str], size: int) -> list[dict[str, Any]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        ranks = []
        for rank in range(size):
            files = {name: str(self.folder / f"{port}_{rank}.{name}") for name in ("out", "err")}
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append({"arguments": arguments, "environment": {**group, **own}, **files})
        return ranks

    def answers(self, jobs: list[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
        """Let ranks go through jobs, and return what each answered to each job."""
        path = self.folder / "jobs.json"
        path.write_text(json.dumps(jobs), encoding="utf-8")
        (ranks,) = self.run(([str(path)], size))
        assert [rank.code for rank in ranks] == [0] * size, "\n".join(rank.err for rank in ranks)
        return [[json.loads(line) for line in rank.out.splitlines()] for rank in ranks]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    found = Launcher(tmp_path_factory.mktemp("ranks"))
    with found.process:
        yield found


@dataclass
class Runs:
    """Where each run was written, and what the ranks answered to each job."""

    folder: Path
    configs: dict[str, RunConfig]
    answers: dict[str, list[dict[str, Any]]]

    def rows(self, name: str, kind: str) -> list[dict[str, Any]]:
        return [row for row in read_metrics(self.folder / name) if row["kind"] == kind]

    def tensors(self, name: str, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
        return read_tensors(step_folder(self.folder / name, N_STEPS) / file).tensors


def build_config(
    folder: Path, corpus: Path, name: str, world_size: int, data: dict[str, Any] | None = None, **changes: Any
) -> RunConfig:
    steps = {**SHARED, "grad_accum_steps": 4 // world_size, "checkpoint_dir": str(folder / name)}
    model = {"base": "waveresnet", "d_model": 16, "n_layers": 2, "n_heads": 2, "d_mlp": 24, "residual_scale": True}
    shared = {"tokenizer": "simple", "vocab_size": 512, "max_length": 12, "val_split": 0.2, "pack_sequences": False}
    sources = [{"path": str(corpus), "per_line": True}]
    config = {"model": model, "data": {**shared, "sources": sources, **(data or {})}, "train": {**steps, **changes}}
    (folder / f"{name}.yaml").write_text(to_yaml(config_from_mapping(config)), encoding="utf-8")
    return config_from_mapping(config)


@pytest.fixture(scope="module")
def runs(
    launcher: Launcher, tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_texts: list[str]
) -> Runs:
    """One launch of two ranks for most laws."""
    folder = tmp_path_factory.mktemp("parallel")
    found = Runs(folder, {}, {})

    def config(name: str, world_size: int, **changes: Any) -> str:
        found.configs[name] = build_config(folder, tiny_corpus, name, world_size, **changes)
        return str(folder / f"{name}.yaml")

    def half_of(name: str) -> str:
        return str(step_folder(folder / name, HALF))

    config("one", 1)
    train(found.configs["one"])
    config("one_muon", 1, optimizer="muon")
    train(found.configs["one_muon"])
    for amp in LOW:
        config(f"one_{amp}", 1, amp=amp)
        train(found.configs[f"one_{amp}"])
    for name, changes in (("one_packed", PACKED), ("one_isolated", ISOLATED)):
        config(name, 1, **changes)
        train(found.configs[name])
    jobs: dict[str, dict[str, Any]] = {
        "ddp_isolated": {"config": config("ddp_isolated", 2, **ISOLATED)},
        "fsdp_isolated": {"config": config("fsdp_isolated", 2, fsdp="full", **ISOLATED)},
        "ddp": {"config": config("ddp", 2, ddp="on")},
        "fsdp": {"config": config("fsdp", 2, fsdp="full", grad_checkpoint=True, grad_sync="micro_batch")},
        "fsdp_muon": {"config": config("fsdp_muon", 2, fsdp="full", optimizer="muon")},
        **{f"fsdp_{amp}": {"config": config(f"fsdp_{amp}", 2, fsdp="full", amp=amp)} for amp in LOW},
        "one_to_fsdp": {"config": config("one_to_fsdp", 2, fsdp="full"), "resume": half_of("one")},
        "fsdp_to_ddp": {"config": config("fsdp_to_ddp", 2), "resume": half_of("fsdp")},
        "back": {"config": config("back", 2), "defer_readback": True},
        "back_fsdp": {"config": config("back_fsdp", 2, fsdp="full"), "defer_readback": True},
        # A signal to rank 1 alone, between two steps that are looked at.
        "stopped": {"config": config("stopped", 2, log_interval_steps=9), "defer_readback": True, "stop": [1, 4]},
        "stopped again": {"config": str(folder / "stopped.yaml"), "stop": [1, 3]},
        "gone on": {"config": str(folder / "stopped.yaml")},
        "count ddp": {"count": "ddp"},
        "count fsdp": {"count": "fsdp"},
        "fit": {"fit": tiny_texts},
    }
    answers = launcher.answers(list(jobs.values()), 2)
    for index, name in enumerate(jobs):
        found.answers[name] = [rank[index] for rank in answers]
    config("fsdp_to_one", 1)
    train(found.configs["fsdp_to_one"], resume=half_of("fsdp"))
    return found


def assert_same_run(runs: Runs, name: str, one: str = "one", *, atol: float = 1e-5) -> None:
    """Losses, figures, parameters and optimiser state of two runs agree to float32 rounding."""
    ours, theirs = runs.rows(name, "train"), runs.rows(one, "train")[-len(runs.rows(name, "train")) :]
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert (a["tokens"], a["epoch"], a["lr"]) == (b["tokens"], b["epoch"], b["lr"])
        assert a["loss"] == pytest.approx(b["loss"], abs=atol)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=max(1e-3, atol))
    for a, b in zip(runs.rows(name, "eval"), runs.rows(one, "eval")[-len(runs.rows(name, "eval")) :], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=atol)
        assert (a["tokens"], a["bytes"]) == (b["tokens"], b["bytes"])
    for file in ("model.safetensors", OPTIMIZER_FILE):
        expected = runs.tensors(one, file)
        found = runs.tensors(name, file)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=atol, rtol=0, msg=f"{name}: {key}")
    states = [read_state(step_folder(runs.folder / run, N_STEPS)) for run in (name, one)]
    assert states[0].position == states[1].position
    assert states[0].position.epoch >= 1


@pytest.mark.parametrize("name", ["ddp", "fsdp", "back", "back_fsdp"])
def test_ddp_and_fsdp_match_single_process(runs: Runs, name: str) -> None:
    assert [answer["ended"] for answer in runs.answers[name]] == ["done", "done"]
    assert_same_run(runs, name)


@pytest.mark.parametrize("name", ["ddp_isolated", "fsdp_isolated"])
def test_parallel_isolated_documents_match_single_process(runs: Runs, name: str) -> None:
    """And not documents that see each other: those lead to other losses after the first step."""
    assert_same_run(runs, name, "one_isolated")
    for kind, first in (("train", 1), ("eval", 0)):
        isolated, packed = ([row["loss"] for row in runs.rows(each, kind)][first:] for each in (name, "one_packed"))
        assert min(abs(a - b) for a, b in zip(isolated, packed, strict=True)) > 5e-5


def test_parallel_signal_to_one_rank_stops_all_alike(runs: Runs) -> None:
    """Looking back they hear of it a step later; either way nothing is lost of the run."""
    for name, step in (("stopped", 5), ("stopped again", 8)):
        stopped = f"130: stopped after step {step} of {N_STEPS}"
        assert [answer["ended"].partition(";")[0] for answer in runs.answers[name]] == [stopped, stopped]
    assert [answer["steps"] for answer in runs.answers["gone on"]] == [N_STEPS, N_STEPS]
    for file in ("model.safetensors", OPTIMIZER_FILE):
        expected, found = runs.tensors("one", file), runs.tensors("stopped", file)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=0, msg=key)


def test_fsdp_muon_matches_muon(runs: Runs) -> None:
    """Its direction is found in bfloat16: rounding weighs more."""
    assert_same_run(runs, "fsdp_muon", "one_muon", atol=3e-3)


@pytest.mark.parametrize("amp", LOW)
def test_fsdp_low_precision_matches_single_process(runs: Runs, amp: str) -> None:
    """And not in float32, which would be a silent substitute: there the losses lie further apart."""
    ours, theirs, exact = (
        [row["loss"] for row in runs.rows(name, "train")] for name in (f"fsdp_{amp}", f"one_{amp}", "one")
    )
    assert len(ours) == N_STEPS
    distance = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert 0 < max(abs(a - b) for a, b in zip(ours, exact, strict=True)) < 0.05
    assert distance < 0.02
    for key, value in runs.tensors(f"one_{amp}").items():
        torch.testing.assert_close(runs.tensors(f"fsdp_{amp}")[key], value, atol=2e-2, rtol=0, msg=key)
    scales = [read_state(step_folder(runs.folder / name, N_STEPS)).scaler for name in (f"fsdp_{amp}", f"one_{amp}")]
    assert bool(scales[0]) is (amp == "fp16")
    assert scales[0] == scales[1]


@pytest.mark.parametrize("name", ["fsdp_to_one", "one_to_fsdp", "fsdp_to_ddp"])
def test_parallel_resume_with_other_parallelism(runs: Runs, name: str) -> None:
    """Twenty steps in one way equal ten in one and ten in another: no window is repeated or lost."""
    assert [row["step"] for row in runs.rows(name, "train")] == list(range(HALF + 1, N_STEPS + 1))
    assert_same_run(runs, name)


def test_four_ranks_continue_others_and_themselves(runs: Runs, launcher: Launcher, tiny_corpus: Path) -> None:
    """More ranks than some matrices have blocks of rows, and windows that some steps do not have for all of them."""

    def job(name: str, resume: str | None = None, **changes: Any) -> dict[str, Any]:
        runs.configs[name] = build_config(runs.folder, tiny_corpus, name, 4, **changes)
        job = {"config": str(runs.folder / f"{name}.yaml")}
        return job if resume is None else {**job, "resume": str(step_folder(runs.folder / resume, HALF))}

    jobs = [job("to_four", "ddp", fsdp="full"), job("four"), job("four_again", "four")]
    answers = launcher.answers(jobs, 4)
    assert [[of_job["ended"] for of_job in answer] for answer in answers] == [["done"] * 3] * 4
    assert_same_run(runs, "to_four")
    # With three ranks or more, the order of a sum depends on where in a bucket an element lies.
    for file in ("model.safetensors", "optimizer.safetensors"):
        whole, resumed = runs.tensors("four", file), runs.tensors("four_again", file)
        assert whole.keys() == resumed.keys()
        assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_fsdp_gathers_full_weights_on_rank_0(runs: Runs) -> None:
    whole = [answer["whole"] for answer in runs.answers["fsdp"]]
    assert whole[0] > 0
    assert whole[1] == 0


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ddp_and_fsdp_exchange_gradients_once_per_step(runs: Runs, kind: str) -> None:
    for answer in runs.answers[f"count {kind}"]:
        assert answer["once"] >= 1
        assert answer["each"] == 3 * answer["once"]
        assert answer["norm"] == pytest.approx(1e-3, rel=1e-3)


def test_fit_on_two_ranks_calls_back_on_rank_0(runs: Runs, launcher: Launcher, tiny_texts: list[str]) -> None:
    ((alone,),) = launcher.answers([{"fit": tiny_texts}], 1)
    first, second = runs.answers["fit"]
    assert second["events"] == []
    assert [event[:3] for event in first["events"]] == [event[:3] for event in alone["events"]]
    assert [event[3] for event in first["events"]] == pytest.approx([event[3] for event in alone["events"]], abs=1e-5)
    assert [name for name, *_ in alone["events"]].count("validation") == 2
    assert first["text"] == second["text"] == alone["text"]


def break_runs(
    launcher: Launcher, faults: dict[str, tuple[str, int, str]], folder: Path, corpus: Path
) -> dict[str, list[list[str]]]:
    """Run a command of two ranks for each fault, all at once; return the errors that the ranks of each named."""
    launches = []
    for name, (place, rank, how) in faults.items():
        build_config(folder, corpus, name, 2, fsdp="full" if rank == 0 else "off", eval_interval_steps=4)
        launches.append(([place, str(rank), how, "train", str(folder / f"{name}.yaml")], 2))
    found = {}
    for (name, (_, rank, how)), ranks in zip(faults.items(), launcher.run(*launches), strict=True):
        said = [each.err for each in ranks]
        assert ranks[1 - rank].code == 1, (name, ranks)
        assert ranks[rank].code == (-signal.SIGKILL if how == "kill" else 1), (name, ranks)
        failed = float(re.findall("failing at (.*)", said[rank])[0])
        assert max(each.ended for each in ranks) - failed < 30, name
        assert "Traceback" not in said[0] + said[1]
        found[name] = [[line for line in text.splitlines() if "error" in line] for text in said]
    return found


def test_parallel_any_failure_ends_all(launcher: Launcher, tmp_path: Path, tiny_corpus: Path) -> None:
    """Rank 0 names it, the others keep quiet."""
    faults = {
        "forward": ("forward", 1, "boom"),
        "evaluation": ("evaluation", 1, "boom"),
        "save": ("save", 0, "no room"),
        "first": ("forward", 0, "boom"),
        "killed": ("forward", 1, "kill"),
        "first_killed": ("forward", 0, "kill"),
    }
    said = break_runs(launcher, faults, tmp_path, tiny_corpus)
    boom = "unexpected ValueError: boom (run again with --debug for the traceback)"
    assert said["forward"] == [[f"error: rank 1: {boom}"], []]
    assert said["evaluation"] == [[f"error: rank 1: {boom}"], []]
    assert said["save"] == [["error: no room"], []]
    assert said["first"] == [[f"error: {boom}"], []]
    for name, rank in (("killed", 1), ("first_killed", 0)):
        assert said[name][rank] == []
        assert len(said[name][1 - rank]) == 1
        assert said[name][1 - rank][0].startswith(f"error: rank {rank}: gone")
    # Rank 0 records it too, not the broken connection in which it noticed.
    status = read_run_status(tmp_path / "killed")
    assert status is not None
    assert f"error: {status[1]}" == said["killed"][0][0]


def test_last_step_is_exact_after_change_of_ranks(tiny_run: Callable[..., RunConfig]) -> None:
    """The steps of the new number of ranks that the rest of the epochs takes, and every window once an epoch."""
    from psannlm.data.loader import Loader, Position
    from psannlm.training.plan import last_step

    class Hundred:
        seq_len, pad_id = 4, 0

        def __len__(self) -> int:
            return 100

        def batch(self, indices: Any) -> tuple[torch.Tensor, torch.Tensor]:
            ids = torch.zeros(len(indices), 4, dtype=torch.int64)
            return ids, ids

        def document_positions(self, indices: Any) -> None:
            return None

    config = tiny_run(max_steps=None, epochs=2)
    windows: Any = Hundred()
    loaders = {size: [Loader(windows, 4, rank=rank, world_size=size) for rank in range(size)] for size in (1, 2, 4)}
    seen: list[int] = []
    step, position = 0, Position()
    for size, until in ((2, 3), (4, 6), (1, None)):
        last = last_step(config, loaders[size][0], step, position)
        for parts in zip(*(loader.steps(position) for loader in loaders[size]), strict=True):
            if step >= (until or last):
                break
            seen += [int(i) for part in parts for batch in part.micro_batches for i in batch.window_ids]
            step, position = step + 1, parts[0].after
    assert position == Position(2, 0)
    assert sorted(seen[:100]) == sorted(seen[100:]) == list(range(100))

"""Checkpoints that the ranks of a sharded run write together, its samples, and its averaged weights."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from psannlm.config.run import RunConfig, config_from_mapping, to_yaml
from psannlm.errors import ArtifactError
from psannlm.generation.generate import draw_samples
from psannlm.models.artifact import load_model
from psannlm.models.tensorfile import read_tensors
from psannlm.reports.runs import read_run
from psannlm.training.checkpoint import (
    EMA_FILE,
    OPTIMIZER_FILE,
    is_own_checkpoint,
    latest_valid_checkpoint,
    list_checkpoints,
    read_state,
    remove_checkpoint,
    step_folder,
)
from psannlm.training.metrics import read_metrics
from psannlm.training.run import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("_no_curve")]
SCRIPT = Path(__file__).with_name("sharded_script.py")
N_RANKS, STEPS, HALF = 3, 6, 3
FILES = ("model.safetensors", OPTIMIZER_FILE, EMA_FILE)
LIMIT_S = 310


def start(jobs: list[dict[str, Any]], folder: Path, n_ranks: int = N_RANKS) -> list[subprocess.Popen[str]]:
    """Start the ranks as a launcher would."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    place |= {"WORLD_SIZE": str(n_ranks), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(n_ranks)
    ]


def finish(ranks: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    """Return what each rank printed; one that exceeds its own time limit is ended here."""
    timers = [threading.Timer(LIMIT_S, rank.kill) for rank in ranks]
    for timer in timers:
        timer.start()
    said = [rank.communicate() for rank in ranks]
    for timer in timers:
        timer.cancel()
    return said


@dataclass
class Runs:
    """The runs of this module, each in a folder of its name."""

    folder: Path
    corpus: Path

    def config(self, name: str, **train: Any) -> RunConfig:
        """Write the configuration of a run; every run makes the same steps."""
        accumulated = 1 if "fsdp" in train else N_RANKS
        steps: dict[str, Any] = {"max_steps": STEPS, "batch_tokens": 12 * 4, "grad_accum_steps": accumulated}
        steps |= {"eval_interval_steps": HALF, "save_interval_steps": HALF, "log_interval_steps": 1}
        steps |= {"lr": 3e-3, "amp": "fp32", "device": "cpu", "ema": 0.9, "keep_checkpoints": 9}
        steps |= {"sample_prompts": ["The ", "A "], "sample_tokens": 8, "eval_tasks": ["psannlm_parity"]}
        sections = {
            # A tensor with fewer rows than ranks, scalars, and copies on every rank.
            "model": {"base": "waveresnet", "d_model": 32, "n_layers": 2, "n_heads": 2, "d_mlp": 9, "n_kv_heads": 1}
            | {"residual_scale": True, "max_seq_len": 64},
            "data": {"tokenizer": "simple", "vocab_size": 512, "max_length": 12, "val_split": 0.2}
            | {"sources": [{"path": str(self.corpus), "per_line": True}], "pack_sequences": False},
            "train": {**steps, "checkpoint_dir": str(self.folder / name), **train},
        }
        config = config_from_mapping(sections)
        (self.folder / f"{name}.yaml").write_text(to_yaml(config), encoding="utf-8")
        return config

    def checkpoint(self, name: str, step: int = STEPS) -> Path:
        return step_folder(self.folder / name, step)

    def tensors(self, name: str, file: str) -> dict[str, Tensor]:
        return read_tensors(self.checkpoint(name) / file).tensors

    def rows(self, name: str, *kinds: str) -> list[dict[str, Any]]:
        return [row for row in read_metrics(self.folder / name) if row["kind"] in kinds]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Runs:
    """One launch of the ranks for all laws but one."""
    found = Runs(tmp_path_factory.mktemp("sharded"), tiny_corpus)
    train(found.config("one"), sampler=draw_samples)
    half = str(found.checkpoint("full", HALF))
    jobs: list[dict[str, Any]] = [{"config": str(found.folder / "full.yaml")}]
    jobs.append({"config": str(found.folder / "again.yaml"), "resume": half})
    for name in ("full", "again"):
        found.config(name, fsdp="full")
    ranks = start(jobs, found.folder)
    said = finish(ranks)
    assert [rank.returncode for rank in ranks] == [0] * N_RANKS, "\n".join(error for _, error in said)
    train(found.config("to_one"), resume=half, sampler=draw_samples)
    return found


def test_sharded_files_hold_what_one_process_writes(runs: Runs) -> None:
    for file in FILES:
        ours, theirs = runs.tensors("full", file), runs.tensors("one", file)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype
            torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=0, msg=f"{file}: {name}")
    for row, other in zip(runs.rows("full", "eval", "ema"), runs.rows("one", "eval", "ema"), strict=True):
        assert (row["kind"], row["step"], row["tokens"]) == (other["kind"], other["step"], other["tokens"])
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_sharded_samples_and_scores_match_one_process(runs: Runs) -> None:
    texts = [(row["step"], row["prompt"], row["text"]) for row in runs.rows("one", "sample")]
    assert len(texts) == 4
    assert [(row["step"], row["prompt"], row["text"]) for row in runs.rows("full", "sample")] == texts
    for row, other in zip(runs.rows("full", "tasks"), runs.rows("one", "tasks"), strict=True):
        assert row == pytest.approx(other)


def test_every_rank_writes_safetensors_and_no_pickle(runs: Runs) -> None:
    """As torch's own reader reads them, without the file that lists them."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    folder = runs.checkpoint("full")
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    for file in FILES:
        names = sorted(path.name for path in (folder / file).with_suffix("").iterdir())
        assert names == [f"shard-{n:05d}-model-00001-of-00001.safetensors" for n in range(1, N_RANKS + 1)]
        expected = runs.tensors("full", file)
        found = {name: torch.full_like(value, 7) for name, value in expected.items() if value.ndim}
        with pytest.warns(UserWarning, match="single process"):
            load(found, storage_reader=HuggingFaceStorageReader(str((folder / file).with_suffix(""))), no_dist=True)
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_sharded_run_resumes_to_identical_bits(runs: Runs) -> None:
    for file in FILES:
        expected, found = runs.tensors("full", file), runs.tensors("again", file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), file
    states = [read_state(runs.checkpoint(name)) for name in ("full", "again")]
    assert states[0].position == states[1].position
    assert states[0].ema == states[1].ema


def test_sharded_checkpoint_resumes_on_one_process(runs: Runs) -> None:
    for file in FILES:
        for name, value in runs.tensors("full", file).items():
            torch.testing.assert_close(runs.tensors("to_one", file)[name], value, atol=1e-5, rtol=0, msg=name)
    assert (runs.checkpoint("to_one") / "model").exists() is False


def test_commands_read_a_sharded_checkpoint(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from psannlm.api import psannLM
    from psannlm.commands.app import main

    def output(*arguments: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--device", "cpu", "--json"])
        printed = capsys.readouterr()
        assert not ended.value.code, printed.err
        return json.loads(printed.out)

    checkpoint = str(runs.checkpoint("full"))
    psannLM.load(checkpoint).save(tmp_path / "whole.safetensors")
    loss, whole, ema = (
        output("eval", str(runs.corpus), "-c", *where, "--out", str(tmp_path / str(number)))["loss"]
        for number, where in enumerate(([checkpoint], [str(tmp_path / "whole.safetensors")], [checkpoint, "--ema"]))
    )
    assert loss == whole != ema
    said = [
        output("generate", "-c", path, "-p", "The ", "--seed", "1")["completions"]
        for path in (str(runs.folder / "full"), str(runs.checkpoint("full") / "model.safetensors"))
    ]
    assert said[0][0]["completion"]
    assert read_run(runs.folder / "full").row.parameters == read_run(runs.folder / "one").row.parameters
    child = runs.config("child", init_from=checkpoint, max_steps=1, eval_tasks=[])
    assert train(child).steps == 1
    assert read_state(runs.checkpoint("child", 1)).lineage is not None


def test_damage_to_any_shard_is_found(runs: Runs, tmp_path: Path) -> None:
    """And the checkpoint before it is taken; both may be removed, unless a file of the user's is among the shards."""
    shutil.copytree(runs.folder / "full", tmp_path / "run")
    folder = step_folder(tmp_path / "run", STEPS)
    shards = sorted(folder.rglob("shard-*"))
    assert len(shards) == 3 * N_RANKS
    for shard in shards[1::3]:
        content = shard.read_bytes()
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ArtifactError, match=shard.name):
            read_state(folder)
        shard.write_bytes(content)
    read_state(folder)
    shards[0].unlink()
    with pytest.raises(ArtifactError, match="copy the whole checkpoint folder"):
        load_model(folder) if "model" in shards[0].parent.name else read_state(folder)
    found = latest_valid_checkpoint(tmp_path / "run")
    assert found is not None
    assert found[0] == step_folder(tmp_path / "run", HALF)
    assert is_own_checkpoint(folder)
    remove_checkpoint(folder)
    (found[0] / "model" / "mine.txt").write_text("mine")
    assert not is_own_checkpoint(found[0])


def test_sharded_run_killed_in_a_save_resumes(runs: Runs) -> None:
    """The whole checkpoint before is taken, and nothing of the other is left."""
    runs.config("killed", fsdp="full", grad_accum_steps=N_RANKS, batch_tokens=12 * 2)
    folder = runs.folder / "killed"
    ranks = start([{"config": str(runs.folder / "killed.yaml"), "hold": [1, 2]}], runs.folder, 2)
    assert ranks[1].stdout is not None
    assert ranks[1].stdout.readline() == "saving\n"
    for rank in ranks:
        rank.kill()
    finish(ranks)
    assert list_checkpoints(folder) == [step_folder(folder, HALF)]
    (unfinished,) = folder.glob(".psannlm-*")
    assert list(unfinished.rglob("shard-*"))
    found = latest_valid_checkpoint(folder)
    assert found is not None
    assert found[1].step == HALF
    assert train(runs.config("killed"), resume=str(found[0]), sampler=draw_samples).steps == STEPS
    assert list(folder.glob(".psannlm-*")) == []
    for file in FILES:
        for tensor, value in runs.tensors("one", file).items():
            torch.testing.assert_close(runs.tensors("killed", file)[tensor], value, atol=1e-5, rtol=0, msg=tensor)

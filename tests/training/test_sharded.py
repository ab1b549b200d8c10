"""Sharded training over several ranks: full, hybrid, compiled, resumed with other ranks, all as one process trains."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.config.run import RankMesh, RunConfig, config_from_mapping, plan_mesh, to_yaml
from psannlm.config.train import TrainConfig
from psannlm.errors import ConfigError
from psannlm.models.tensorfile import read_tensors
from psannlm.training.checkpoint import OPTIMIZER_FILE, read_state, step_folder
from psannlm.training.metrics import read_metrics

SCRIPT = Path(__file__).with_name("rank_forks.py")
N_STEPS, STEPS_PER_SAVE = 8, 2
LIMIT_S = 600
Jobs = dict[str, dict[str, Any]]


# Keys of the feed-forward and of attention that add parameters, matrices and vectors, in one model.
VARIANT = {"sine_quadrature": True, "activation_gains": True, "activation_norm": True, "embedding_norm": True}
VARIANT |= {"qkv_features": "fan"}


def build_config(
    folder: Path,
    corpus: Path,
    name: str,
    n_ranks: int,
    is_packed: bool = False,
    variant: dict[str, Any] | None = None,
    **changes: Any,
) -> str:
    """Write a configuration with ragged windows (else packed), accumulation and two dilations; return its path."""
    model = {"base": "waveresnet", "d_model": 16, "n_layers": 2, "n_heads": 2, "d_mlp": 24, "residual_scale": True}
    data = {"tokenizer": "simple", "vocab_size": 512, "max_length": 12, "val_split": 0.2, "pack_sequences": is_packed}
    train = {"max_steps": N_STEPS, "batch_tokens": 12 * 2, "grad_accum_steps": 8 // n_ranks, "lr": 3e-3, "amp": "fp32"}
    train |= {"device": "cpu", "log_interval_steps": 1, "eval_interval_steps": 4, "keep_checkpoints": 9}
    train |= {"save_interval_steps": STEPS_PER_SAVE, "sample_prompts": [], "checkpoint_dir": str(folder / name)}
    config = {
        "model": {**model, "short_conv": {"dilation_growth": 2}, **(variant or {})},
        "data": {**data, "sources": [{"path": str(corpus), "per_line": True}]},
        "train": {**train, **changes},
    }
    path = folder / f"{name}.yaml"
    path.write_text(to_yaml(config_from_mapping(config)), encoding="utf-8")
    return str(path)


def run_jobs(jobs: Jobs, folder: Path) -> dict[str, dict[str, Any]]:
    """Run the jobs in forks of one process, and return what became of each."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(list(jobs.values())), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(path)], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(jobs, json.loads(done.stdout), strict=True))


@dataclass
class Runs:
    """Where each run was written."""

    folder: Path
    answers: dict[str, dict[str, Any]]

    def rows(self, name: str, kind: str = "train") -> list[dict[str, Any]]:
        return [row for row in read_metrics(self.folder / name) if row["kind"] == kind]

    def tensors(self, name: str, file: str) -> dict[str, torch.Tensor]:
        return read_tensors(step_folder(self.folder / name, self.rows(name)[-1]["step"]) / file).tensors


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Runs:
    """All runs, one after the other, in forks of one process: importing torch takes longer than a run."""
    folder = tmp_path_factory.mktemp("sharded")

    def job(name: str, n_ranks: int, resume: str = "auto", **changes: Any) -> dict[str, Any]:
        path = build_config(folder, tiny_corpus, name, n_ranks, **changes)
        return {"configs": [path] * n_ranks, "resume": resume}

    def after(name: str, step: int) -> str:
        return str(step_folder(folder / name, step))

    hybrid: dict[str, Any] = {"fsdp": "hybrid", "shard_size": 2}
    rates = {"lr_scale": {"embedding": 4.0, "head": 0.5, "scalars": 2.0, "activations": 0.1}, "decay_embeddings": False}
    jobs: Jobs = {
        "one": job("one", 1),
        "one_muon": job("one_muon", 1, optimizer="muon", **rates),
        "ddp": job("ddp", 4, ddp="on"),
        "full": job("full", 4, fsdp="full", grad_checkpoint=True),
        "hybrid": job("hybrid", 4, **hybrid, grad_sync="micro_batch"),
        "hybrid_muon": job("hybrid_muon", 4, **hybrid, optimizer="muon", **rates),
        "two": job("two", 2, after("full", 2), fsdp="full"),
        "alone": job("alone", 1, after("two", 4)),
        "four": job("four", 4, after("alone", 6), **hybrid),
        "full_to_hybrid": job("full_to_hybrid", 4, after("full", 4), **hybrid),
        # Windows and batches of one size: torch compiles again for another. Two ranks, each of which compiles.
        "one_packed": job("one_packed", 1, is_packed=True, max_steps=4),
        "compiled": {**job("compiled", 2, is_packed=True, max_steps=4, fsdp="full", compile=True), "graphs": True},
        "one_variant": job("one_variant", 1, variant=VARIANT, max_steps=4),
        "full_variant": job("full_variant", 2, variant=VARIANT, max_steps=4, fsdp="full", grad_checkpoint=True),
        "count": {"count": 4},
    }
    return Runs(folder, run_jobs(jobs, folder))


def assert_same_run(runs: Runs, name: str, one: str = "one", *, atol: float = 1e-5) -> None:
    """Losses, figures, parameters and optimiser state of two runs agree to float32 rounding."""
    assert runs.answers[name]["codes"] == [0] * len(runs.answers[name]["codes"]), runs.answers[name]["said"]
    for kind in ("train", "eval"):
        ours = runs.rows(name, kind)
        theirs = runs.rows(one, kind)[-len(ours) :]
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert a["tokens"] == b["tokens"]
            assert a["loss"] == pytest.approx(b["loss"], abs=atol)
    for file in ("model.safetensors", OPTIMIZER_FILE):
        expected, found = runs.tensors(one, file), runs.tensors(name, file)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=atol, rtol=0, msg=f"{name}: {key}")
    for step in {row["step"] for row in runs.rows(name) if row["step"] % STEPS_PER_SAVE == 0}:
        states = [read_state(step_folder(runs.folder / run, step)) for run in (name, one)]
        assert states[0].position == states[1].position
        assert states[0].tokens == states[1].tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "full", "hybrid"])
def test_sharded_on_four_ranks_matches_one_process(runs: Runs, name: str) -> None:
    assert_same_run(runs, name)


@pytest.mark.slow
def test_sharded_hybrid_muon_matches_one_process(runs: Runs) -> None:
    assert_same_run(runs, "hybrid_muon", "one_muon", atol=3e-3)


@pytest.mark.slow
def test_sharded_variant_matches_one_process(runs: Runs) -> None:
    """With gains, norms and a matrix before attention, which other models lack."""
    assert_same_run(runs, "full_variant", "one_variant")


@pytest.mark.slow
def test_sharded_compiled_matches_eager(runs: Runs) -> None:
    """Blocks of different dilation too, of which one would run with the dilation of the other."""
    assert_same_run(runs, "compiled", "one_packed")
    # One graph for each of the two blocks, and one of the trial of the compiler.
    assert min(runs.answers["compiled"]["graphs"]) >= 3


@pytest.mark.slow
def test_sharded_resumes_on_four_two_one_four_ranks(runs: Runs) -> None:
    for name, first in (("two", 3), ("alone", 5), ("four", 7), ("full_to_hybrid", 5)):
        assert [row["step"] for row in runs.rows(name)] == list(range(first, N_STEPS + 1))
        assert_same_run(runs, name)


@pytest.mark.slow
def test_sharded_hybrid_reduces_between_replicas_once(runs: Runs) -> None:
    """With ``micro_batch``, gradients are sharded after each micro-batch; replicas still exchange them once."""
    for counts in runs.answers["count"]["counts"]:
        (scattered, reduced), (scattered_each, reduced_each) = counts["once"], counts["each"]
        assert scattered >= 1
        assert (scattered_each, reduced_each) == (3 * scattered, reduced)
        assert counts["norm"] == pytest.approx(1e-3, rel=1e-3)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("faults")
    jobs: Jobs = {}
    for name in ("alone", "slow", "code"):
        path = build_config(folder, tiny_corpus, name, 4)
        jobs[name] = {"configs": [path] * 4, "fault": [name, 2]}
    path, other = (build_config(folder, tiny_corpus, name, 4, lr=lr) for name, lr in (("lr", 3e-3), ("lr2", 2e-3)))
    jobs["configuration"] = {"configs": [path, path, other, path]}
    return run_jobs(jobs, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("alone", r"rank 2: waits in barrier at \S+ in step, a collective operation that other ranks have not entered"),
        ("code", r"rank 2: differs from rank 0: the source of psannlm \(SHA-256\) is '0+' here and '[0-9a-f]+' there"),
        ("configuration", r"rank 2: differs from rank 0: train.lr is 0.002 here and 0.003 there"),
    ],
)
def test_sharded_fault_is_one_line_on_its_rank(faults: dict[str, dict[str, Any]], name: str, said: str) -> None:
    fault = faults[name]
    (line,) = [line for lines in fault["errors"] for line in lines]
    assert re.search(said, line), line
    assert 0 not in fault["codes"]


@pytest.mark.slow
def test_sharded_slow_rank_is_named_and_run_continues(faults: dict[str, dict[str, Any]]) -> None:
    fault = faults["slow"]
    assert fault["codes"] == [0, 0, 0, 0], fault["said"]
    (line,) = [line for text in fault["said"] for line in text.splitlines() if "rank 2 is slow" in line]
    assert re.search(r"rank 2 is slow: 3 of 4 ranks have waited 3 s for it in all_reduce at training/step.py", line), (
        line
    )


def test_plan_mesh_names_the_remedy() -> None:
    assert plan_mesh(TrainConfig(), 8, 4) == RankMesh(8, 1)
    assert plan_mesh(TrainConfig(fsdp="full"), 8, 4) == RankMesh(1, 8)
    assert plan_mesh(TrainConfig(fsdp="hybrid"), 8, 4) == RankMesh(2, 4)
    assert plan_mesh(TrainConfig(fsdp="hybrid", shard_size=2), 8, 4) == RankMesh(4, 2)
    for n_ranks, n_local, size, said in (
        (8, 8, None, r"the same as fsdp: full; set it to 2 or 4"),
        (8, 1, None, r"this one has one rank of 8; set it to 2 or 4"),
        (6, 6, 4, r"4 ranks for each copy of the model do not divide the 6 ranks; set it to 2 or 3"),
        (2, 2, None, r"set train.fsdp: full"),
    ):
        with pytest.raises(ConfigError, match=rf"train\.shard_size: .*{said}"):
            plan_mesh(TrainConfig(fsdp="hybrid", shard_size=size), n_ranks, n_local)


def test_shard_size_without_hybrid_is_refused(tiny_run: Callable[..., RunConfig]) -> None:
    for settings, said in (
        ({"shard_size": 2}, "has no effect with fsdp: off"),
        ({"shard_size": 2, "fsdp": "full"}, "has no effect with fsdp: full"),
        ({"shard_size": 1, "fsdp": "hybrid"}, "shards nothing"),
        ({"fsdp": "hybrid", "ddp": "off"}, "needs several ranks"),
    ):
        with pytest.raises(ConfigError, match=said):
            tiny_run(**settings)
    assert tiny_run(fsdp="hybrid", shard_size=2, compile=True).train.compile is True

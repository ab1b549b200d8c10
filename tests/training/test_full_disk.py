"""A full disk at each write of a run: named, older files unharmed, and the run resumes later."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.config.run import RunConfig
from psannlm.errors import StorageError
from psannlm.models.artifact import load_model
from psannlm.models.tensorfile import read_tensors
from psannlm.runtime.log import receiving_messages
from psannlm.training import plan
from psannlm.training.checkpoint import latest_valid_checkpoint, list_checkpoints, step_folder
from psannlm.training.metrics import read_metrics
from psannlm.training.plan import plan_training
from psannlm.training.run import train
from psannlm.training.run_folder import RunStatus, read_run_status
from tests.training.test_sharded import build_config, run_jobs

TinyRun = Callable[..., RunConfig]
# Bytes beyond which a rank cannot write to a file: fewer than a shard of the weights has, and between those of one and
# of AdamW's state.
NO_WEIGHTS, NO_MOMENTS = 4096, 25_000

pytestmark = pytest.mark.usefixtures("_no_curve")


class FullAt:
    """Stands for os.fsync, where a full disk is noticed at the latest; refuses its call number ``number``."""

    def __init__(self, number: int) -> None:
        self.number, self.calls = number, 0

    def __call__(self, handle: int) -> None:
        self.calls += 1
        if self.calls == self.number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    names = ("model.safetensors", "optimizer.safetensors")
    return {f"{name}:{key}": value for name in names for key, value in read_tensors(folder / name).tensors.items()}


@pytest.mark.slow
def test_full_disk_anywhere_is_reported_and_run_resumes(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step is safe; the next is tried with the first write failing, then the second, until none does."""
    config = tiny_run(max_steps=2, save_interval_steps=1, eval_interval_steps=1, keep_checkpoints=1)
    folder, safe = Path(config.train.checkpoint_dir), tmp_path / "safe"
    train(config, time_budget_s=0.0)
    folder.rename(safe)
    shutil.copytree(safe, folder)
    train(config)
    expected = all_tensors(step_folder(folder, 2))
    metrics = [(row["kind"], row["step"]) for row in read_metrics(folder)]

    number, refused = 0, []
    while True:
        number += 1
        shutil.rmtree(folder)
        shutil.copytree(safe, folder)
        disk = FullAt(number)
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", disk)
            try:
                train(config)
            except StorageError as failure:
                message = str(failure)
            else:
                break
        assert "not enough disk space to write" in message
        assert str(folder) in message
        assert "\n" not in message
        refused.append(message)
        with receiving_messages(pytest.fail):
            found = latest_valid_checkpoint(folder)
        assert found is not None
        assert found[1].step >= 1
        load_model(found[0])
        if number % 4 == 0:  # the room is back
            result = train(config)
            found_again = all_tensors(step_folder(folder, 2))
            assert all(torch.equal(value, expected[name]) for name, value in found_again.items())
            assert [(row["kind"], row["step"]) for row in read_metrics(folder)] == metrics
            assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]
            assert result.checkpoint in list_checkpoints(folder)
    assert disk.calls < number
    # The configuration is not among them: one that says the same is left as it is.
    for written in ("system.json", "metrics.jsonl", "step_00000002", "latest", "best"):
        assert any(written in message for message in refused), written


def test_dry_run_warns_of_too_small_disk(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture
) -> None:
    """As many as are kept, the best one, and the one that is being written."""
    config = tiny_run(keep_checkpoints=3)
    needed = 5 * plan_training(config).checkpoint_bytes
    for free in (needed, needed - 1):
        monkeypatch.setattr(plan, "free_bytes", lambda path, free=free: free)
        logged.clear()
        plan_training(config)
        assert any("train.keep_checkpoints" in line for line in logged.messages) == (free < needed)
    (line,) = [line for line in logged.messages if "train.keep_checkpoints" in line]
    assert config.train.checkpoint_dir in line


@dataclass
class SharedRuns:
    """Runs of three ranks that write shards: where each is, and what became of its ranks."""

    folder: Path
    answers: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> SharedRuns:
    """One without a fault; some whose second save fails on some ranks; and one of these, started again with room."""
    folder = tmp_path_factory.mktemp("shared")

    def job(name: str, *fault: Any) -> dict[str, Any]:
        path = build_config(folder, tiny_corpus, name, 3, fsdp="full", max_steps=4)
        return {"configs": [path] * 3, **({"fault": fault} if fault else {})}

    jobs = {
        "straight": job("straight"),
        "weights": job("weights", f"full at {NO_WEIGHTS}", 2),
        "both": job("both", f"full at {NO_WEIGHTS}", 1, 2),
        "moments": job("moments", f"full at {NO_MOMENTS}", 1),
        "resumed": job("moments"),
    }
    return SharedRuns(folder, run_jobs(jobs, folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "file"), [("weights", "2", "model"), ("both", "12", "model"), ("moments", "1", "optimizer")]
)
def test_full_disk_of_one_rank_ends_all(shared_runs: SharedRuns, name: str, ranks: str, file: str) -> None:
    """In one line, of the rank that could not write, with the remedy."""
    answer, folder = shared_runs.answers[name], shared_runs.folder / name
    assert answer["codes"] == [1, 1, 1], answer["said"]
    (line,) = [line for lines in answer["errors"] for line in lines]
    problem = rf"not enough disk space to write \S+/{file}: [^;]*; free some space or choose another folder\."
    saved = re.escape(str(step_folder(folder, 4)))
    assert re.fullmatch(rf"error: rank [{ranks}]: {saved} was not saved: {problem}", line), line
    status = read_run_status(folder)
    assert status is not None
    if name != "moments":  # which has resumed
        assert status[0] is RunStatus.FAILED
        assert line == f"error: {status[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weights", "both"])
def test_full_disk_of_one_rank_keeps_earlier_checkpoint(shared_runs: SharedRuns, name: str) -> None:
    """And nothing else."""
    folder = shared_runs.folder / name
    assert list_checkpoints(folder) == [step_folder(folder, 2)]
    assert (folder / "latest").read_text(encoding="utf-8").strip() == step_folder(folder, 2).name
    with receiving_messages(pytest.fail):
        found = latest_valid_checkpoint(folder)
    assert found is not None
    load_model(found[0])
    assert list(folder.glob(".psannlm-*")) == []


@pytest.mark.slow
def test_full_disk_of_one_rank_resumes_bit_identical(shared_runs: SharedRuns) -> None:
    answer, folder = shared_runs.answers["resumed"], shared_runs.folder
    assert answer["codes"] == [0, 0, 0], answer["said"]
    assert f"resuming from {step_folder(folder / 'moments', 2)}: step 2 of 4" in answer["said"][0]
    expected, found = (all_tensors(step_folder(folder / name, 4)) for name in ("straight", "moments"))
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []

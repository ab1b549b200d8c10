"""A full disk at each write of a run: named, older files unharmed, and the run resumes later."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

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

TinyRun = Callable[..., RunConfig]


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

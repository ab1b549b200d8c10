"""Two processes that share the windows train the model that one process trains."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from psannlm.config.run import RunConfig, to_yaml
from psannlm.models.tensorfile import read_tensors
from psannlm.training.checkpoint import list_checkpoints, read_state, step_folder
from psannlm.training.metrics import read_metrics
from psannlm.training.run import train

SCRIPT = Path(__file__).with_name("train_script.py")


def launch(config: RunConfig, folder: Path, world_size: int) -> list[str]:
    """Start the ranks as torchrun would, wait, and return what each said."""
    path = folder / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(SCRIPT), str(path)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    return [process.communicate(timeout=120)[0] for process in processes]


@pytest.mark.usefixtures("_no_curve")
def test_two_processes_equal_one(tiny_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Unpacked, so that windows hold 1 to 12 labels; with accumulation, validation, and an epoch that ends unevenly."""
    shared = {
        "data": {"pack_sequences": False, "max_length": 12},
        "max_steps": 12,
        "lr": 3e-3,
        "eval_interval_steps": 6,
        "save_interval_steps": 6,
        "keep_checkpoints": 9,
    }
    folders = {name: tmp_path / name for name in ("one", "two")}
    one = tiny_run(**shared, batch_tokens=12 * 4, grad_accum_steps=4, checkpoint_dir=str(folders["one"]))
    two = tiny_run(**shared, batch_tokens=12 * 4, grad_accum_steps=2, checkpoint_dir=str(folders["two"]), ddp="on")
    train(one)
    assert launch(two, tmp_path, 2) == ["done\n", "done\n"]

    rows = {name: [row for row in read_metrics(folder) if row["kind"] == "train"] for name, folder in folders.items()}
    assert [row["step"] for row in rows["two"]] == list(range(1, 13))
    for a, b in zip(rows["one"], rows["two"], strict=True):
        assert (a["tokens"], a["epoch"], a["lr"]) == (b["tokens"], b["epoch"], b["lr"])
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    evals = {name: [row for row in read_metrics(folder) if row["kind"] == "eval"] for name, folder in folders.items()}
    for a, b in zip(evals["one"], evals["two"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert (a["tokens"], a["bytes"]) == (b["tokens"], b["bytes"])
    last = {
        name: read_tensors(step_folder(folder, 12) / "model.safetensors").tensors for name, folder in folders.items()
    }
    for name, value in last["one"].items():
        torch.testing.assert_close(last["two"][name], value, atol=1e-5, rtol=0, msg=name)
    states = [read_state(list_checkpoints(folder)[-1]) for folder in folders.values()]
    assert states[0].position == states[1].position
    assert states[0].position.epoch >= 1

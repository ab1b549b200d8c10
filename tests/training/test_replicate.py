"""Replicas of a model under DDP."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch.distributed as dist
from torch import nn, ones
import torch
from psannlm.runtime.distributed import World
from psannlm.training.parallel import replicate

dist.init_process_group("gloo", store=dist.FileStore(STORE, 1), rank=0, world_size=1)
model = nn.Linear(3, 3)
module = replicate(model, World(0, 0, 2), torch.device("cpu"))
for _ in range(2):
    module(ones(2, 3)).sum().backward()
print(float(model.weight.grad.sum()))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_replicas_write_no_warning_to_the_terminal(tmp_path: Path) -> None:
    """That of DDP goes past Python's filters, once in every process."""
    script = SCRIPT.replace("STORE", repr(str(tmp_path / "store")))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("36.0\n", "")

"""Benchmarks collect rubbish before every run; what the test session holds already need not be searched each time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from psannlm.benchmarks.gpu_stage import REHEARSAL, Stage


@pytest.fixture(scope="package", autouse=True)
def _old_objects_are_left_alone() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """What a check of a GPU gets in a rehearsal, with fewer steps."""
    return Stage(torch.device("cpu"), replace(REHEARSAL, n_steps=4, repeats=1), True, tmp_path)

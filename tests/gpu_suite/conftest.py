"""Fixtures of the GPU suite's tests: a context for a dry run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from psannlm.gpu_suite.context import DRY_RUN, CheckContext


@pytest.fixture
def context(tmp_path: Path) -> CheckContext:
    """Return the context of a dry run, with fewer steps."""
    return CheckContext(torch.device("cpu"), replace(DRY_RUN, n_steps=4, repeats=1), True, tmp_path)

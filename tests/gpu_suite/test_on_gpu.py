"""All checks of the GPU validation suite on a GPU at small sizes, without throughput limits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from psannlm.gpu_suite.context import DRY_RUN, CheckContext
from psannlm.gpu_suite.suite import CHECKS, run_check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHECKS)
def test_check_passes_on_gpu_at_small_sizes(name: str, tmp_path: Path) -> None:
    result = run_check(name, CHECKS[name], CheckContext(torch.device("cuda"), DRY_RUN, True, tmp_path / name))
    assert result.status in ("ok", "skipped"), result.problems()

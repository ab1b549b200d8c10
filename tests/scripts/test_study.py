"""scripts/study.sh: how many runs it trains at the same time."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "study.sh"


@pytest.mark.parametrize(
    ("n_gpus", "jobs", "wanted"),
    [("8", "", "compare {plan}"), ("0", "", "compare {plan} --jobs {cores}"), ("8", "3", "compare {plan} --jobs 3")],
)
def test_study_script_starts_one_run_per_gpu(tmp_path: Path, n_gpus: str, jobs: str, wanted: str) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("base: other.yaml\n")
    for name, line in (("psannlm", 'echo "$@"'), ("python", f"echo {n_gpus}")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PSANNLM": str(tmp_path / "psannlm"), "JOBS": jobs}
    # nproc counts OMP_NUM_THREADS too.
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run([SCRIPT, plan], env=environment, capture_output=True, text=True, check=True)
    cores = subprocess.run(["nproc"], env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert done.stdout == wanted.format(plan=plan, cores=cores) + "\n"

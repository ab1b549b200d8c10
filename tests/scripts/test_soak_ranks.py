"""A short run of scripts/soak_ranks.py: in each mode a rank of four is killed within a save, and one within a step."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "soak_ranks.py"
# In a save, these seeds kill rank 0, which writes all files, and rank 3, which writes its shards.
SEEDS = {"off": 4, "hybrid": 5}


@pytest.fixture(scope="module")
def soaks() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All modes at the same time: much of a kill is waiting."""
    command = [sys.executable, "-P", str(SCRIPT), "--kills", "2", "--steps", "12", "--json"]
    with ExitStack() as stack:
        started = {
            mode: stack.enter_context(
                subprocess.Popen(
                    [*command, "--modes", mode, "--seed", str(seed)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for mode, seed in SEEDS.items()
        }
        yield started


@pytest.mark.slow
@pytest.mark.parametrize("mode", SEEDS)
def test_killed_ranks_end_all_and_resume_bit_identical(soaks: dict[str, subprocess.Popen[str]], mode: str) -> None:
    """The script itself fails where a rank lives on, another rank is named, or a bit differs."""
    out, err = soaks[mode].communicate()
    assert soaks[mode].returncode == 0, err
    figures = json.loads(out)
    assert figures["of them"] == {mode: {"within a save": 1, "within a step": 1}}
    assert figures["runs, each equal to one left in peace"] >= 1
    assert figures["seconds until all ranks had ended, most"] < 30

"""The examples run as they are, from a folder of the user's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_train_then_generate(tmp_path: Path) -> None:
    examples = Path(__file__).resolve().parents[1] / "examples" / "lm"
    for script, said in (("minimal_train.py", "saved to minimal_model.safetensors"), ("generate.py", "A clock")):
        done = subprocess.run([sys.executable, examples / script], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
        assert "Warning" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["minimal_model.safetensors"]

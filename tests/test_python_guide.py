"""docs/guides/python.md: its blocks run in order, in an empty folder."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "guides" / "python.md"


@pytest.mark.slow
def test_blocks_of_the_python_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, block in enumerate(blocks):
            exec(compile(block, f"block {number} of {GUIDE.name}", "exec"), names)
    assert (tmp_path / "trained.safetensors").is_file()
    assert (tmp_path / "runs" / "story" / "metrics.jsonl").is_file()

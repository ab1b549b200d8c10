"""What one platform has is not needed: neither its modules, nor ``/proc`` and ``/sys``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name("portable_script.py")
# It runs the command line when it is imported, and they extend classes of transformers, which is optional.
NOT_IMPORTED = {
    "psannlm.__main__",
    "psannlm.hf",
    "psannlm.export.modeling_psannlm",
    "psannlm.export.configuration_psannlm",
    "psannlm.export.verify_child",
    "psannlm.export.gguf_verify_child",
}


def modules() -> list[str]:
    """Return every module, by its installed name."""
    paths = [
        path.relative_to(REPOSITORY)
        for folder in ("psannlm", "commands")
        for path in (REPOSITORY / folder).rglob("*.py")
    ]
    names = [re.sub(r"\.__init__$", "", ".".join(path.with_suffix("").parts)) for path in paths]
    return sorted({f"psannlm.{name}" if name.startswith("commands") else name for name in names} - NOT_IMPORTED)


@pytest.mark.slow
def test_smoke_run_needs_nothing_of_one_platform(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, *modules()], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [2, 4]
    assert {row.get("peak_memory_bytes") for row in rows} == {None}, "unknown, and not 0"
    assert not (tmp_path / "run" / ".lock").exists()

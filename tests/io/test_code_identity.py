"""The hash of the code that trains: every module that decides a loss is in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import psannlm
from psannlm.io import code_identity

_TRAIN = """
import sys
from psannlm.config.run import load_config
from psannlm.training.run import train
train(load_config(sys.argv[1]))
print("MODULES", *(getattr(module, "__file__", None) or "" for name, module in sorted(sys.modules.items())
                   if name.startswith("psannlm.")))
"""
_CONFIG = """
model: {{base: waveresnet, d_model: 16, n_layers: 1, n_heads: 2}}
data:
  sources: [{{path: {corpus}, per_line: true}}]
  tokenizer: simple
  max_length: 16
  val_split: 0.2
train: {{max_steps: 2, batch_tokens: 64, amp: fp32, device: cpu, eval_tasks: [psannlm_parity], eval_interval_steps: 1,
  checkpoint_dir: {folder}}}
"""
# Packages without influence on a loss, and those whose values the configuration compares.
_WITHOUT = ("config", "generation", "io", "runtime", "display.py", "errors.py", "__init__.py")


@pytest.mark.slow
def test_hashed_code_includes_all_that_trains(tmp_path: Path, tiny_corpus: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(_CONFIG.format(corpus=json.dumps(str(tiny_corpus)), folder=json.dumps(str(tmp_path / "run"))))
    done = subprocess.run(
        [sys.executable, "-c", _TRAIN, str(config)], capture_output=True, text=True, env={**os.environ}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    root = Path(psannlm.__path__[0])
    [line] = [line for line in done.stdout.splitlines() if line.startswith("MODULES")]
    used = {Path(path).relative_to(root) for path in line.split()[1:]}
    assert Path("evaluation/tasks/score.py") in used
    hashed = {
        path.relative_to(root)
        for name in code_identity._SOURCES
        for path in ([root / name] if name.endswith(".py") else (root / name).rglob("*.py"))
    }
    others = {path for path in used - hashed if path.parts[0] not in _WITHOUT and path.name != "__init__.py"}
    assert others == set()


def test_hash_changes_with_content_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "psannlm"
    (package / "io").mkdir(parents=True)
    (package / "models").mkdir()
    monkeypatch.setattr(code_identity, "__file__", str(package / "io" / "code_identity.py"))

    def hashed(name: str, content: str) -> str:
        for path in (package / "models").iterdir():
            path.unlink()
        (package / "models" / name).write_text(content)
        code_identity.sources_sha256.cache_clear()
        return code_identity.sources_sha256(("models",))

    first = hashed("a.py", "x = 1\n")
    assert hashed("a.py", "x = 1\n") == hashed("a.py", "x = 1\r\n") == first
    assert len({first, hashed("a.py", "x = 2\n"), hashed("b.py", "x = 1\n")}) == 3
    code_identity.sources_sha256.cache_clear()

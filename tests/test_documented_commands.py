"""Commands as the documents print them, run from a folder like a fresh clone."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from psannlm.config.run import load_config

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The folders of a clone that the documented commands name; what they write stays in it."""
    for name in ("examples", "configs", "scripts"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(folder: Path, line: str, timeout_s: float = 600, **variables: str) -> str:
    """Run a printed command with this Python; return stdout and stderr. A non-zero exit code fails the test."""
    words = shlex.split(line)
    words = [sys.executable, *words[1:]] if words[0] == "python" else words
    if words[0] == "psannlm":
        words = [sys.executable, "-m", "psannlm", *words[1:]]
    environment = {**os.environ, "COLUMNS": "200", **variables}
    ended = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout + ended.stderr


def test_cpu_quickstart_trains_within_seconds(clone: Path) -> None:
    said = run(clone, "python -m psann.lm.train.cli --config examples/lm/configs/waveresnet_cpu.yaml", timeout_s=120)
    assert "fp32 as asked" in said
    assert "all of the training text 40 times" in said
    config = load_config(clone / "runs/example_waveresnet_cpu/config.yaml")
    assert [str(getattr(source, "path", "")) for source in config.data.sources] == ["examples/lm/sample_texts.txt"]
    assert (config.train.amp, config.train.ddp) == ("fp32", "off")
    log = (clone / "runs/example_waveresnet_cpu/metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in log.splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[-1] < 0.5 < losses[0]


TINY = "examples/lm/configs/tiny_corpus_benchmark.yaml"


def test_tiny_corpus_benchmark_states_its_fraction(clone: Path) -> None:
    run(clone, "python scripts/make_tiny_corpus.py --bytes 150000 --if-missing")
    smaller = "--set model.d_model=16 --set model.n_layers=1 --set model.n_heads=1 --set train.batch_tokens=4096"
    smaller += " --set train.device=cpu --set train.warmup_steps=2"
    said = run(clone, f"psannlm train {TINY} {smaller} --max-steps 9 --set train.eval_interval_steps=9")
    plan = json.loads(run(clone, f"psannlm train {TINY} {smaller} --dry-run --json").partition("\n}")[0] + "\n}")
    assert plan["steps_per_epoch"] > 9
    seen = 9 * plan["batches"]["micro_batch_size"] / plan["n_windows"]
    assert f"{seen:.1%} of the training text, once" in said


def test_tiny_corpus_benchmark_takes_one_epoch(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(clone, "python scripts/make_tiny_corpus.py --bytes 9000 --if-missing")
    monkeypatch.chdir(clone)
    config = load_config(TINY)
    assert [str(getattr(source, "path", "")) for source in config.data.sources] == ["datasets/lm/tiny_books.txt"]
    assert (config.train.epochs, config.train.max_steps) == (1, None)
    assert TINY in (REPOSITORY / "scripts/next_gpu_batch.sh").read_text(encoding="utf-8")

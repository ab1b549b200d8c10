"""A closed terminal or a lost connection, SIGHUP, ends real commands as SIGTERM does: saved, and the same goes on."""

from __future__ import annotations

import glob
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from psannlm.tokenizers.char import CharTokenizer

LIMIT_S = 400
CONFIG = """\
model: {base: transformer, d_model: 16, n_layers: 1, n_heads: 2}
data:
  {sources: [{path: corpus.txt, per_line: true}], tokenizer: simple, vocab_size: 300, max_length: 16, val_split: 0.2}
train: {epochs: 1000000, batch_tokens: 64, amp: fp32, device: cpu, log_interval_steps: 1, checkpoint_dir: run}
"""
PLAN = """\
base: config.yaml
budget: {tokens: 6400000}
baseline: swiglu
variants: {swiglu: {model: {base: transformer, mlp: swiglu}}, sine: {model: {base: transformer, mlp: sine}}}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    lines = [f"The tide number {n} comes in twice a day and goes out {n * 7} times." for n in range(60)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "plan.yaml").write_text(PLAN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hang_up(arguments: list[str], is_under_way: Callable[[], bool]) -> subprocess.CompletedProcess[str]:
    """Start a command, send it SIGHUP as soon as it is under way, and return how it ended."""
    process = subprocess.Popen(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-m", "psannlm", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + LIMIT_S
        while not is_under_way():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGHUP)
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert "Traceback" not in err
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def steps(run: Path) -> int:
    log = run / "metrics.jsonl"
    rows = [line for line in log.read_text().splitlines() if '"train"' in line] if log.is_file() else []
    return json.loads(rows[-1])["step"] if rows else 0


@pytest.mark.slow
def test_a_training_whose_terminal_closes_is_saved(project: Path) -> None:
    done = hang_up(["train", "config.yaml"], lambda: steps(project / "run") >= 3)
    assert done.returncode == 130, done.stderr
    assert "run the same command to resume" in done.stderr
    (saved,) = (project / "run").glob("step_*")
    assert saved.name == f"step_{steps(project / 'run'):08d}"


@pytest.mark.slow
def test_a_comparison_whose_terminal_closes_is_saved(project: Path) -> None:
    # glob, since pathlib's search fails when a temporary folder goes away under it.
    logs = str(project / "runs" / "**" / "metrics.jsonl")
    done = hang_up(
        ["compare", "plan.yaml"],
        lambda: any(steps(Path(log).parent) >= 3 for log in glob.glob(logs, recursive=True)),
    )
    assert done.returncode == 130, done.stderr
    (saved,) = project.rglob("step_*")
    assert saved.name == f"step_{steps(saved.parent):08d}"


@pytest.mark.slow
def test_prep_continues_when_its_terminal_closes(project: Path) -> None:
    CharTokenizer("").save(project / "t.json")
    (project / "large.txt").write_text((project / "corpus.txt").read_text() * 6000, encoding="utf-8")
    command = ["prep", "large.txt", "--per-line", "--tokenizer", "t.json", "--out", "p", "--workers", "1"]
    command += ["--keep-duplicates"]
    done = hang_up(command, lambda: any((project / "p" / ".work").glob("piece_*")))
    assert done.returncode == 130, done.stderr
    assert "run the same command to resume" in done.stderr
    assert any((project / "p" / ".work").glob("piece_*"))
    assert not (project / "p" / "manifest.json").exists()

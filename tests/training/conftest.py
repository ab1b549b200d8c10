"""What tests of the training room share: tiny runs, and what can be seen of a run from outside."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psannlm.config.run import RunConfig, config_from_mapping

TINY_MODEL = {"base": "waveresnet", "d_model": 16, "n_layers": 1, "n_heads": 2, "d_mlp": 24}
TINY_DATA = {"tokenizer": "simple", "vocab_size": 512, "max_length": 16, "val_split": 0.2}
# 16 windows a step make 6 steps an epoch of the tiny corpus.
TINY_TRAIN = {
    "max_steps": 4,
    "batch_tokens": 128,
    "grad_accum_steps": 2,
    "lr": 1e-2,
    "amp": "fp32",
    # As --device says; what needs several processes or forks names the CPU itself.
    "device": os.environ.get("PSANNLM_TEST_DEVICE", "cpu"),
    "log_interval_steps": 1,
}


@pytest.fixture
def tiny_run(tmp_path: Path, tiny_corpus: Path) -> Callable[..., RunConfig]:
    """Return a builder of tiny runs: keywords are ``train`` keys, and ``model`` and ``data`` mappings."""

    def build(model: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **train: Any) -> RunConfig:
        sources = [{"path": str(tiny_corpus), "per_line": True}]
        sections = {
            "model": {**TINY_MODEL, **(model or {})},
            "data": {"sources": sources, **TINY_DATA, **(data or {})},
            "train": {"checkpoint_dir": str(tmp_path / "run"), **TINY_TRAIN, **train},
        }
        return config_from_mapping(sections)

    return build


@pytest.fixture
def _no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawing, which takes longer than a tiny run."""
    monkeypatch.setattr("psannlm.training.run.draw_curve", lambda folder, title, rows: folder / "loss_curve.png")


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, str]]:
    """Return a reader of a folder tree: relative path to hash of every file."""

    def read(folder: Path) -> dict[str, str]:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    return read


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test pulls the plug, and waiting for the disk takes longer than training."""
    monkeypatch.setattr("os.fsync", lambda handle: None)

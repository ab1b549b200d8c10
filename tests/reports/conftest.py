"""Fixtures that write run folders and artifact folders as the commands do."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psannlm.config.yaml_loader import dump_yaml

SYSTEM = {
    "time_utc": "2026-11-20T08:00:00+00:00",
    "command": "psannlm train x.yaml",
    "processor": "Abacus 9000",
    "threads": 2,
    "packages": {"torch": "2.13.0"},
    "commit": "0123456789abcdef",
    "gpus": [],
}
CONFIG = """\
model:
  base: {base}
  mlp: null
data:
  sources:
  - path: {corpus}
    per_line: true
train:
  lr: {lr}
  seed: 1
  batch_tokens: 100
  checkpoint_dir: runs/x
"""


@pytest.fixture
def make_run() -> Callable[..., Path]:
    """Return a maker of run folders: four steps, validated at two and four, with a checkpoint of 6 + 4 elements."""

    def make(
        folder: Path, base: str = "waveresnet", corpus: str = "texts", lr: float = 2e-05, shift: float = 0.0
    ) -> Path:
        folder.mkdir(parents=True)
        rows: list[dict[str, Any]] = []
        for step, loss, rate in ((1, 5.0, 10.0), (2, 4.0, 100.0), (3, 3.5, 50.0), (4, 3.25, 200.0)):
            figures = {"loss": loss + shift, "lr": lr, "tokens": 100 * step, "tokens_per_s": rate}
            rows.append({"kind": "train", "step": step, **figures, "peak_memory_bytes": 1000 * step})
            if step % 2 == 0:
                scores = {"loss": loss + 0.5 + shift, "perplexity": 90.017, "bits_per_byte": 2.125 + shift}
                rows.append({"kind": "eval", "step": step, **scores})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        corpus = json.dumps(corpus)
        (folder / "config.yaml").write_text(
            CONFIG.format(base=base, corpus=corpus, lr=dump_yaml(lr).split()[0]), encoding="utf-8"
        )
        (folder / "system.json").write_text(json.dumps(SYSTEM))
        checkpoint = folder / "step_00000004"
        checkpoint.mkdir()
        (checkpoint / "trainer.json").write_text(json.dumps({"state": {"corpus_sha256": "c" * 64}}))
        header = json.dumps({"__metadata__": {}, "a": {"shape": [2, 3]}, "b": {"shape": [4]}}).encode()
        (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        return folder

    return make


@pytest.fixture
def make_artifact() -> Callable[..., Path]:
    """Return a maker of ``reports/<kind>/<ts>`` folders."""

    def make(folder: Path, figures: dict[str, Any], **system: Any) -> Path:
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(figures))
        (folder / "system.json").write_text(json.dumps({**SYSTEM, **system}))
        (folder / "table.txt").write_text("a table\n")
        return folder

    return make

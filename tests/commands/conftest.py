"""Fixtures: the command line in-process, and one tiny trained run shared by the tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from psannlm.commands.app import main

LINES = [
    "The tide comes in twice a day and goes out twice a day.",
    "A clock that is right twice a day is not a good clock.",
    "Words are waves that one mouth makes and one ear takes.",
    "The sea does not hurry, and the sea is never late.",
    "Say a thing three times and somebody will believe it.",
    "What goes round comes round, said the wheel to the road.",
]
CONFIG = """\
model: {base: waveresnet, d_model: 16, n_layers: 1, n_heads: 2}
data:
  sources: [{path: corpus.txt, per_line: true}]
  tokenizer: simple
  vocab_size: 300
  max_length: 16
  val_split: 0.2
train:
  max_steps: 4
  batch_tokens: 64
  lr: 1e-2
  amp: fp32
  device: cpu
  eval_interval_steps: 2
  checkpoint_dir: runs/tiny
"""


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command line."""

    code: int
    out: str
    err: str


@pytest.fixture
def psannlm(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run the command line in the current folder: ``psannlm("train", "c.yaml")``."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        printed = capfd.readouterr()
        return Outcome(int(ended.value.code or 0), printed.out, printed.err)

    return run


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a corpus and a configuration, as the working folder."""
    (tmp_path / "corpus.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of the configuration above."""
    from psannlm.config.run import load_config
    from psannlm.training.run import train

    folder = tmp_path_factory.mktemp("trained")
    (folder / "corpus.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(load_config("config.yaml"))
    return folder

"""The import path and the command line of older documents lead to the same things as the new ones."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import psannlm
from psann.lm.train.cli import translate


def test_the_old_import_path_gives_the_same_objects() -> None:
    old = importlib.import_module("psann.lm")
    assert old.psannLM is psannlm.psannLM
    assert old.psannLMDataPrep is psannlm.psannLMDataPrep


def test_an_unknown_name_says_where_to_look() -> None:
    with pytest.raises(AttributeError, match="new code imports from psannlm"):
        _ = importlib.import_module("psann.lm").psannLMTrainer


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--config", "a.yaml"], ["train", "a.yaml"]),
        (["--config=a=b.yaml", "--dry-run"], ["train", "a=b.yaml", "--dry-run"]),
        (["--set", "train.lr=1", "--config", "a.yaml"], ["train", "a.yaml", "--set", "train.lr=1"]),
        (["--help"], ["train", "--help"]),
        (["--config"], ["train"]),
        ([], ["train"]),
    ],
)
def test_arguments_are_translated(old: list[str], new: list[str]) -> None:
    assert translate(old) == new


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["--help"], 0, "Usage: psannlm train"),
        ([], 2, "Usage: psannlm train"),
        (["--config", "absent.yaml"], 2, "absent.yaml"),
    ],
)
def test_the_old_command_runs_the_new_one(arguments: list[str], exit_code: int, said: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "psann.lm.train.cli", *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == exit_code, result.stderr
    assert said in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_the_sections_of_a_configuration_import_from_the_old_path() -> None:
    from psann.lm.config import DataConfig, ModelConfig, TrainConfig

    assert (ModelConfig().positional_encoding, DataConfig().max_length, TrainConfig().amp) == ("rope", 256, "auto")

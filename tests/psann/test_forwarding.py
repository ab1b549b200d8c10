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


def test_unknown_name_error_points_to_the_new_path() -> None:
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


def test_old_import_path_has_the_configuration_sections() -> None:
    from psann.lm.config import DataConfig, ModelConfig, TrainConfig

    assert (ModelConfig().positional_encoding, DataConfig().max_length, TrainConfig().amp) == ("rope", 256, "auto")


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("psann.lm", ["Callback", "LMDataset", "Trainer", "psannLM", "psannLMDataPrep"]),
        ("psann.lm.config", ["DataConfig", "ModelConfig", "TrainConfig"]),
        ("psann.lm.data", ["DataConfig", "LMDataset", "psannLMDataPrep"]),
        ("psann.lm.data.dataset", ["LMDataset"]),
        ("psann.lm.models", ["ModelConfig", "Transformer", "build_model"]),
        ("psann.lm.train", ["Callback", "Trainer"]),
        ("psann.lm.train.trainer", ["Callback", "StepEvent", "Trainer"]),
    ],
)
def test_every_published_path_has_its_names(path: str, names: list[str]) -> None:
    module = importlib.import_module(path)
    assert set(names) <= set(module.__all__)
    for name in module.__all__:
        found = getattr(module, name)
        assert found is getattr(psannlm, name, found)
    with pytest.raises(AttributeError):
        _ = module.nowhere


def test_networks_are_built_from_the_low_level_config() -> None:
    import torch

    from psann.lm.models import ModelConfig, Transformer, build_model

    for position in ("rope", "alibi", "sinusoidal"):
        config = ModelConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=30, positional_encoding=position)
        network = build_model(config, seed=0)
        assert isinstance(network, Transformer)
        assert network.config.positional_encoding == position
        assert network(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 30)

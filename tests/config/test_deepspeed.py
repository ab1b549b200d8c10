"""DeepSpeed keys lead to train.fsdp, in YAML, sections and fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from psannlm.config.run import config_from_mapping, load_config, section_from_kwargs
from psannlm.config.train import TrainConfig
from psannlm.errors import ConfigError


@pytest.mark.parametrize("key", ["deepspeed", "deepspeed_config", "zero_stage"])
@pytest.mark.parametrize("value", [None, True, "ds.json"])
def test_deepspeed_keys_name_fsdp_everywhere(key: str, value: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"train:\n  lr: 0.001\n  {key}: {value or 'null'}\n")
    calls: list[Any] = [
        lambda: TrainConfig(**{key: value}),
        lambda: section_from_kwargs(TrainConfig, "train", {key: value}),
        lambda: config_from_mapping({"train": {key: value}}),
        lambda: load_config(file),
        lambda: load_config(_plain(tmp_path), [f"train.{key}=on"]),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=r"does not use DeepSpeed.*train\.fsdp: full.*torchrun") as caught:
            call()
        assert caught.value.problems[0].path == f"train.{key}"
        assert len(caught.value.problems) == 1
    # In Python an unknown keyword is a TypeError too.
    with pytest.raises(TypeError, match="fsdp='full'"):
        TrainConfig(**{key: value})


def _plain(folder: Path) -> Path:
    (folder / "plain.yaml").write_text("train:\n  lr: 0.001\n")
    return folder / "plain.yaml"

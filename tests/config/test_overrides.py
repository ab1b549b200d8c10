from __future__ import annotations

from pathlib import Path

import pytest

from psannlm.config.run import RunConfig, load_config
from psannlm.errors import ConfigError


def load(folder: Path, text: str, *overrides: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(text)
    return load_config(path, overrides, check_files=False)


def test_override_values_are_yaml_and_last_wins(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "train: {lr: 1, ddp: off, max_steps: 5}\nmodel:\n  sine_params: {amp_init: 3}\n",
        "train.lr=1",
        "train.lr=3e-4",
        "train.ddp=on",
        "train.max_steps=",
        "model.sine_params.freq_init=2",
        "data.sources=[a.txt, {path: b.txt, per_line: true}]",
        "train.checkpoint_dir=runs/a=b",
    )
    assert config.train.lr == 3e-4
    assert config.train.ddp == "on"
    assert config.train.max_steps is None
    assert (config.model.sine_params.amp_init, config.model.sine_params.freq_init) == (3, 2)
    assert [getattr(source, "path", None) for source in config.data.sources] == ["a.txt", "b.txt"]
    assert config.train.checkpoint_dir == "runs/a=b"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.lr", "override 'train.lr': write section.key=value"),
        ("=3", "write section.key=value"),
        ("train.=3", "write section.key=value"),
        ("lr=3", "it belongs to train"),
        ("train=3", "name a key in it"),
        ("train.lr=[1", "quote the value"),
        ("train.lr=!!python/name:os.system x", "is not allowed"),
        ("train.checkpoint_dir=a: b: c", "quote the value"),
        ("train.lrr=3", "train.lrr: unknown key (did you mean 'lr'?) (from the override 'train.lrr=3')"),
        ("train.lr.x=3", "train.lr: {'x': 3} is not a number (from the override 'train.lr.x=3')"),
        ("trian.lr=3", "trian: unknown section (did you mean 'train'?)"),
        ("train.lr=-1", "train.lr: -1 is too small"),
        ("train.lr=\ud800", "U+D800"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "train:\n  epochs: 2\n", override)
    assert part in str(caught.value)
    assert len(caught.value.problems) == 1


def test_override_error_names_override_not_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "train:\n  epochs: x\n  lr: 1\n", "train.lr=y", "foo")
    assert [(problem.path, problem.line) for problem in caught.value.problems] == [
        ("train.epochs", 2),
        ("", None),
        ("train.lr", None),
    ]


def test_override_drops_lines_below_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "data:\n  sources:\n    - a.txt\n", "data.sources=[{pth: b}]")
    assert [(problem.path, problem.line) for problem in caught.value.problems] == [("data.sources[0].pth", None)]


def test_override_replaces_a_wrong_value_of_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, "train: {epochs: x}", "train.epochs=2").train.epochs == 2
    with pytest.raises(ConfigError, match=r"train.*is not a group of keys"):
        load(tmp_path, "train: 3", "train.epochs=2")

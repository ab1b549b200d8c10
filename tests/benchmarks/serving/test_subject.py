"""The model that is served: built of random weights, or read from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from psannlm.benchmarks.serving.own_engine import Asked, OwnEngine
from psannlm.benchmarks.serving.subject import build_subject, read_subject
from psannlm.config.model import ModelConfig
from psannlm.errors import ConfigError

CONFIG = ModelConfig(base="transformer", d_model=16, n_layers=1, n_heads=2, vocab_size=300)


def test_built_subject_is_read_back_and_generates(tmp_path: Path) -> None:
    built = build_subject(CONFIG, 300, 7, tmp_path)
    assert built.config.max_seq_len == 300
    read = read_subject(tmp_path, 300)
    assert (read.file, read.config, read.parameters) == (built.file, built.config, built.parameters)
    assert read.tokenizer.fingerprint == built.tokenizer.fingerprint
    with pytest.raises(ConfigError, match="exceed the model's context of 300"):
        read_subject(tmp_path, 301)
    engine = OwnEngine(built.file, "float32", False, "cpu")
    asked = [Asked("The value", 5, 0.8, seed) for seed in (1, 2, 1)]
    first, other, same = engine.answers(asked)
    assert first == same != other
    assert engine.batch(asked)[0] <= 15
    # Another seed of the weights is another model.
    (tmp_path / "b").mkdir()
    build_subject(CONFIG, 300, 8, tmp_path / "b")
    assert OwnEngine(tmp_path / "b", "float32", False, "cpu").answers(asked[:1]) != [first]

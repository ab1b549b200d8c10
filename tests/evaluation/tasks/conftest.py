"""Fixtures of the task tests: scorers of a random model and of one with constant logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from psannlm.generation.engine import Engine
from psannlm.generation.scoring import Scorer
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.base import Tokenizer

Build = Callable[..., Transformer]


@pytest.fixture
def model(byte_tokenizer: Tokenizer, build_tiny: Build) -> Transformer:
    return build_tiny(vocab_size=byte_tokenizer.vocab_size, max_seq_len=400)


@pytest.fixture
def scorer(model: Transformer) -> Scorer:
    return Scorer(Engine(model))


@pytest.fixture
def constant_scorer(model: Transformer) -> Scorer:
    """Every token is equally likely at every position."""
    with torch.no_grad():
        model.output_weight.zero_()
    return Scorer(Engine(model))

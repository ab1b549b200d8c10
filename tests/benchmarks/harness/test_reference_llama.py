"""Llama of transformers as a reference model: its parameter count, and its greedy decoding."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from psannlm.benchmarks.harness.reference_llama import llama_parameters, llama_width
from psannlm.benchmarks.harness.reference_models import build_reference_model
from psannlm.benchmarks.harness.reference_task import ReferenceTask
from psannlm.config.model import ModelConfig
from psannlm.models.accounting import count_parameters
from psannlm.models.registry import resolve

TINY = resolve(ModelConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=80, max_seq_len=32))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("n_kv_heads", [None, 2])
@pytest.mark.parametrize("base", ["respsann", "waveresnet", "transformer"])
def test_llama_width_is_nearest_to_parameter_count(base: str, n_kv_heads: int | None, tie: bool) -> None:
    config = resolve(
        ModelConfig(
            base=base,
            d_model=64,
            n_layers=3,
            n_heads=4,
            n_kv_heads=n_kv_heads,
            vocab_size=500,
            tie_embeddings=tie,
        )
    )
    ours = sum(count_parameters(config).values())
    width = llama_width(config, ours)
    assert width % 16 == 0
    apart = abs(llama_parameters(config, width) - ours)
    assert apart <= min(abs(llama_parameters(config, width + step) - ours) for step in (-16, 16))
    assert apart < 0.05 * ours


def test_llama_parameters_match_our_transformer() -> None:
    """Our baseline is a Llama in every respect: same norms, no biases, a gated feed-forward."""
    config = resolve(ModelConfig(base="transformer", d_model=64, n_layers=3, n_heads=4, d_mlp=160, vocab_size=500))
    assert llama_parameters(config, 160) == sum(count_parameters(config).values())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="the extra hf is not installed")
@pytest.mark.filterwarnings("ignore")
def test_llama_decodes_greedily_to_full_length() -> None:
    parameters = sum(count_parameters(TINY).values())
    task = ReferenceTask(TINY, parameters, 2, 32, "float32", torch.device("cpu"))
    reference_model = build_reference_model("transformers", task)
    assert reference_model.parameters == llama_parameters(TINY, llama_width(TINY, parameters))
    assert f"{reference_model.parameters:,} parameters" in reference_model.description
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
    ids = reference_model.generate(prompts, 6)
    assert [len(row) for row in ids] == [6, 6]
    assert reference_model.generate(prompts, 1) == [row[:1] for row in ids]
    assert reference_model.generate(prompts, 6) == ids

"""Reference model: parameter count, timing of prefill and decoding, and missing packages."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from psannlm.benchmarks.decoding.modes import Prompts
from psannlm.benchmarks.harness import reference_llama
from psannlm.benchmarks.harness.reference_llama import (
    build_reference_model,
    decode_with,
    llama_parameters,
    llama_width,
    require_reference_model,
)
from psannlm.config.model import ModelConfig
from psannlm.errors import ConfigError, PsannlmError
from psannlm.models.accounting import count_parameters
from psannlm.models.registry import resolve

TINY = resolve(ModelConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=80, max_seq_len=32))


class FakeReferenceModel:
    """Needs 5 s for the prompts and 2 s for every token after the first."""

    name, description, parameters = "fake", "a fake", 7

    def __init__(self, missing: int = 0, prefill_s: float = 5.0, step_s: float = 2.0) -> None:
        self.now, self.missing, self.prefill_s, self.step_s = 0.0, missing, prefill_s, step_s
        self.asked: list[int] = []

    def generate(self, prompts: Prompts, max_new_tokens: int) -> Prompts:
        self.asked.append(max_new_tokens)
        self.now += self.prefill_s + self.step_s * (max_new_tokens - 1)
        return [[1] * (max_new_tokens - self.missing * (max_new_tokens > 1)) for _ in prompts]


def test_reference_model_prefill_is_one_token_run() -> None:
    reference_model = FakeReferenceModel()
    run = decode_with(reference_model, [[1, 2], [3, 4]], 11, lambda: reference_model.now)
    assert reference_model.asked == [1, 11]
    assert (run.prefill_s, run.decode_s, run.total_s) == (5.0, 20.0, 25.0)
    assert run.decode_tokens_per_s == 2 * 10 / 20.0
    assert run.tokens_per_s == 2 * 11 / 25.0


def test_reference_model_early_stop_raises() -> None:
    reference_model = FakeReferenceModel(missing=1)
    with pytest.raises(PsannlmError, match=r"fake generated \[10\] tokens per row instead of 11"):
        decode_with(reference_model, [[1, 2]], 11, lambda: reference_model.now)


def test_reference_model_unmeasurable_decode_time_raises() -> None:
    reference_model = FakeReferenceModel(step_s=0.0)
    with pytest.raises(PsannlmError, match="raise --max-new-tokens"):
        decode_with(reference_model, [[1, 2]], 4, lambda: reference_model.now)


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


def test_unknown_or_missing_reference_model_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean 'transformers'"):
        require_reference_model("transformer")
    monkeypatch.setattr(reference_llama.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -c constraints\.txt '\.\[hf\]'"):
        build_reference_model("transformers", TINY, 1000, 32, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="the extra hf is not installed")
@pytest.mark.filterwarnings("ignore")
def test_llama_decodes_greedily_to_full_length() -> None:
    parameters = sum(count_parameters(TINY).values())
    reference_model = build_reference_model("transformers", TINY, parameters, 32, torch.device("cpu"))
    assert reference_model.parameters == llama_parameters(TINY, llama_width(TINY, parameters))
    assert f"{reference_model.parameters:,} parameters" in reference_model.description
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
    ids = reference_model.generate(prompts, 6)
    assert [len(row) for row in ids] == [6, 6]
    assert reference_model.generate(prompts, 1) == [row[:1] for row in ids]
    assert reference_model.generate(prompts, 6) == ids

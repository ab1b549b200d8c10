"""Reference models of the decoding benchmark: timing of prefill and decoding, missing packages, llama.cpp's tokens."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

from psannlm.benchmarks.decoding.modes import Prompts
from psannlm.benchmarks.harness import reference_models
from psannlm.benchmarks.harness.reference_models import (
    build_reference_model,
    decode_with,
    require_reference_model,
)
from psannlm.benchmarks.harness.reference_task import ReferenceTask
from psannlm.config.model import ModelConfig
from psannlm.errors import ConfigError, PsannlmError
from psannlm.generation.engine import Engine
from psannlm.generation.quantize import WeightDtype
from psannlm.models.accounting import count_parameters
from psannlm.models.registry import resolve

TINY = resolve(ModelConfig(d_model=64, n_layers=2, n_heads=2, vocab_size=80, max_seq_len=32))


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


def test_unknown_or_missing_reference_model_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean 'transformers'"):
        require_reference_model("transformer")
    monkeypatch.setattr(reference_models.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -c constraints\.txt '\.\[hf\]'"):
        build_reference_model("transformers", ReferenceTask(TINY, 1000, 2, 32, "float32", torch.device("cpu")))
    with pytest.raises(ConfigError, match=r"needs the package gguf.*pip install -c constraints\.txt '\.\[gguf\]'"):
        require_reference_model("llama.cpp")


PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8], [1]]


def task_of(dtype: WeightDtype = "float32", device: str = "cpu") -> ReferenceTask:
    return ReferenceTask(TINY, sum(count_parameters(TINY).values()), 3, 32, dtype, torch.device(device))


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize(("dtype", "stated"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "q8_0")])
def test_llama_cpp_decodes_our_weights_in_every_dtype(dtype: WeightDtype, stated: str) -> None:
    from psannlm.benchmarks.harness.reference_llama_cpp import LlamaCpp

    reference_model = LlamaCpp(task_of(dtype))
    assert reference_model.description.endswith(stated)
    assert abs(reference_model.parameters / task_of().parameters - 1) < 0.05
    ids = reference_model.generate(PROMPTS, 8)
    assert reference_model.generate(PROMPTS, 8) == ids
    assert reference_model.generate(PROMPTS, 1) == [row[:1] for row in ids]
    engine = Engine(reference_model.model)
    for row, prompt in zip(ids, PROMPTS, strict=True):
        assert reference_model.generate([prompt], 8) == [row]
        wanted = engine.prefill([[*prompt, *row[:-1]]], 1)[0][0]
        found = torch.tensor(reference_model.logits(0))
        distance = float((found - wanted).abs().max() / wanted.abs().max())
        # llama.cpp keeps keys and values in float16.
        assert distance < (5e-3 if dtype == "float32" else 0.05)


@pytest.mark.skipif(find_spec("ctranslate2") is None, reason="ctranslate2 is not installed")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("int8", 0.1)])
def test_ctranslate2_decodes_our_weights_in_every_dtype(dtype: WeightDtype, tolerance: float) -> None:
    from psannlm.benchmarks.harness.reference_ctranslate2 import CTranslate2

    reference_model = CTranslate2(task_of(dtype))
    assert abs(reference_model.parameters / task_of().parameters - 1) < 0.05
    ids = reference_model.generate(PROMPTS, 8)
    assert reference_model.generate(PROMPTS, 1) == [row[:1] for row in ids]
    engine = Engine(reference_model.model)
    for row, prompt in zip(ids, PROMPTS, strict=True):
        assert len(row) == 8
        whole = [*prompt, *row[:-1]]
        wanted = engine.prefill([whole], 1)[0][0]
        found = torch.tensor(reference_model.logits(whole))
        assert float((found - wanted).abs().max() / wanted.abs().max()) < tolerance
        if dtype == "float32":
            assert row == [int(engine.prefill([whole[: len(prompt) + n]], 1)[0].argmax()) for n in range(8)]


def test_ctranslate2_refuses_what_processor_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    from psannlm.benchmarks.harness.reference_ctranslate2 import CTranslate2

    package = ModuleType("ctranslate2")
    package.get_supported_compute_types = lambda device: {"float32", "int8", "int8_float32"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ctranslate2", package)
    with pytest.raises(ConfigError, match=r"not compute in bfloat16 on this processor; use --dtype float32 or int8$"):
        CTranslate2(task_of("bfloat16"))
    with pytest.raises(ConfigError, match="--against ctranslate2 runs on the CPU; add --device cpu"):
        CTranslate2(task_of(device="cuda"))


def test_llama_cpp_is_refused_on_a_gpu() -> None:
    pytest.importorskip("gguf")
    from psannlm.benchmarks.harness.reference_llama_cpp import LlamaCpp

    with pytest.raises(ConfigError, match=r"--against llama\.cpp runs on the CPU; add --device cpu"):
        LlamaCpp(task_of(device="cuda"))


def test_reference_model_is_our_own_transformer_of_equal_size() -> None:
    from psannlm.benchmarks.harness.exportable_transformer import exportable_config

    assert TINY.base == "waveresnet"
    config = exportable_config(task_of())
    assert (config.base, config.mlp, config.short_conv.enabled) == ("transformer", "swiglu", False)
    assert abs(sum(count_parameters(config).values()) / task_of().parameters - 1) < 0.05

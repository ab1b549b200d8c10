"""An exported Llama under lm-eval's own model for transformers gives the log-likelihoods of psannlm's engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psannlm.evaluation.tasks.harness import EngineModel, harness_model
from psannlm.export.export import ExportSettings, export_hf
from psannlm.generation.engine import Engine
from psannlm.generation.scoring import Scorer
from psannlm.models.artifact import load_model, save_model
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.resolve import fit_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
QUESTIONS = [
    ("The tide comes in", " twice a day"),
    ("The tide comes in", " never"),
    ("The tide comes in ", "late"),
    ("", "Words are waves"),
    ("What goes round comes round, said the wheel to the road. " * 8, " And the road said nothing."),
]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_exported_model_has_the_same_log_likelihoods(
    qk_norm: bool, build_tiny: Callable[..., Transformer], tiny_texts: list[str], tmp_path: Path
) -> None:
    instance: Any = pytest.importorskip("lm_eval.api.instance").Instance
    pytest.importorskip("accelerate")
    hflm: Any = pytest.importorskip("lm_eval.models.huggingface").HFLM
    tokenizer = fit_tokenizer(tiny_texts, backend="sentencepiece", vocab_size=320)
    model = build_tiny(base="transformer", qk_norm=qk_norm, vocab_size=tokenizer.vocab_size, max_seq_len=64)
    path = tmp_path / "tiny.safetensors"
    save_model(path, model, tokenizer)
    export_hf(path, tmp_path / "hf", ExportSettings(is_verified=False))
    theirs = hflm(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=2)
    loaded = load_model(path)
    assert loaded.tokenizer is not None
    ours = harness_model(EngineModel(Scorer(Engine(loaded.model), 3), loaded.tokenizer))
    requests = [instance("loglikelihood", {}, pair, index) for index, pair in enumerate(QUESTIONS)]
    for mine, other in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-4)
        assert mine[1] == bool(other[1])

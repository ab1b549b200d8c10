"""lm-evaluation-harness over HTTP: its own client of completions gives the log-likelihoods of ``psannlm eval``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.evaluation.tasks.harness import EngineModel, harness_model
from psannlm.export.export import ExportSettings, export_hf
from psannlm.generation.engine import Engine
from psannlm.generation.scoring import Scorer
from psannlm.kernels.onednn import Linear
from psannlm.models.artifact import save_model
from psannlm.models.transformer import Transformer
from psannlm.serving.scheduler import Scheduler
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import fit_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
PAIRS = [
    ("The tide comes in", " twice a day"),
    ("The tide comes in", " never"),
    ("The tide comes in", " \u2014 so they say"),
    ("", "Words are waves"),
    ("What goes round comes round, said the wheel to the road. " * 4, " And the road said nothing."),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_texts: list[str]) -> Tokenizer:
    return fit_tokenizer(tiny_texts, backend="tokenizers", vocab_size=320)


@pytest.fixture(scope="module", params=["any next token", "EOS next"])
def model(request: pytest.FixtureRequest, build_tiny: Callable[..., Transformer], tokenizer: Tokenizer) -> Transformer:
    model = build_tiny(base="transformer", vocab_size=tokenizer.vocab_size, max_seq_len=400)
    if request.param == "EOS next":
        # The harness asks for one new token and drops it: one without text must not be left out of the answer.
        assert tokenizer.eos_id is not None
        assert isinstance(model.head, Linear)
        with torch.no_grad():
            model.embedding.weight[:, 0] = 100.0
            model.head.weight[:, 0] = 0.0
            model.head.weight[tokenizer.eos_id, 0] = 5.0
    return model


@pytest.fixture
def harness(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path, start_server: Callable[..., Any]
) -> Iterator[Any]:
    """The harness's client of a server of the model, with the tokenizer of its exported folder."""
    pytest.importorskip("tenacity")
    local: Any = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI
    save_model(tmp_path / "tiny.safetensors", model, tokenizer)
    export_hf(tmp_path / "tiny.safetensors", tmp_path / "hf", ExportSettings(is_verified=False))
    server = start_server(Scheduler(Engine(model), tokenizer, max_batch=4))
    yield local(
        base_url=f"{server.url}/v1/completions",
        model="tiny",
        tokenizer=str(tmp_path / "hf"),
        add_bos_token=True,
        batch_size=3,
        max_length=400,
        max_retries=1,
    )
    server.stop()


def test_harness_over_http_gives_the_same_log_likelihoods(
    harness: Any, model: Transformer, tokenizer: Tokenizer
) -> None:
    from lm_eval.api.instance import Instance

    ours = harness_model(EngineModel(Scorer(Engine(model), 3), tokenizer))
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(PAIRS)]
    for mine, other in zip(ours.loglikelihood(requests), harness.loglikelihood(requests), strict=True):
        assert other[0] == pytest.approx(mine[0], abs=1e-5)
        assert other[1] == mine[1]

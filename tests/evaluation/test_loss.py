"""Evaluation counts every token once, for any batch size and number of ranks, and does not change the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psannlm.config.constants import IGNORE_INDEX
from psannlm.config.model import ModelConfig
from psannlm.data.memory_store import store_from_ids
from psannlm.data.windows import Windows
from psannlm.errors import ConfigError, CorpusError
from psannlm.evaluation.loss import Evaluation, _refuse_oversize, evaluate
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import Precision
from psannlm.runtime.distributed import World
from psannlm.runtime.progress import Progress

FP32 = Precision(torch.device("cpu"), torch.float32, "fp32 as asked")
BOS, EOS, PAD = 1, 2, 0


def windows_of(lengths: list[int], seq_len: int = 5, pack: bool = True, isolate: bool = False) -> Windows:
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(4, 17, (n,), generator=generator).tolist() for n in lengths]
    store = store_from_ids(documents, 17, bos_id=BOS, eos_id=EOS, doc_bytes=[3 * n for n in lengths])
    return Windows(store, seq_len, pad_id=PAD, pack=pack, isolate_documents=isolate)


class Scribe(nn.Module):
    """Charges each label its own number of nats, and writes down what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[int] = []
        self.batches: list[int] = []
        self.modes: set[bool] = set()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        assert input_ids.shape == labels.shape
        assert not torch.is_grad_enabled()
        counted = labels[labels != IGNORE_INDEX]
        self.labels += counted.tolist()
        self.batches.append(len(labels))
        self.modes.add(self.training)
        return counted.float().sum()


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_evaluation_counts_every_token_once(pack: bool, batch_size: int) -> None:
    windows = windows_of([7, 0, 4, 12, 1], pack=pack)
    scribe = Scribe()
    found = evaluate(scribe, windows, precision=FP32, batch_size=batch_size)
    wanted = sorted(i for i in windows.store.tokens(0, windows.store.n_framed_tokens).tolist() if i != BOS)
    assert sorted(scribe.labels) == wanted
    assert (found.nats, found.n_labels, found.n_bytes) == (sum(wanted), 24 + 5, 3 * 24)
    assert sum(scribe.batches) == len(windows)
    assert max(scribe.batches) == min(batch_size, len(windows))


@pytest.mark.parametrize("pack", [True, False])
def test_evaluation_is_independent_of_batch_size(pack: bool, build_tiny: Callable[..., Transformer]) -> None:
    model, windows = build_tiny(), windows_of([7, 0, 4, 12, 1], pack=pack)
    at_once = evaluate(model, windows, precision=FP32, batch_size=100)
    for batch_size in (1, 2, 4):
        assert evaluate(model, windows, precision=FP32, batch_size=batch_size).nats == pytest.approx(at_once.nats)
    nats = 0.0
    with torch.no_grad():
        for index in range(len(windows)):
            input_ids, labels = windows.batch([index])
            logits = model.logits(model.hidden_states(input_ids))
            nats += float(F.cross_entropy(logits[0], labels[0], reduction="sum"))
    assert at_once.nats == pytest.approx(nats, rel=1e-5)


def test_evaluation_known_values() -> None:
    # 16 bits for 8 tokens that are 4 bytes of text: 2 bits a token, 4 bits a byte.
    found = Evaluation(nats=16 * math.log(2), n_labels=8, n_bytes=4)
    assert found.bits_per_byte == pytest.approx(4.0)
    assert found.perplexity == pytest.approx(4.0)
    assert found.loss == pytest.approx(2 * math.log(2))
    assert found.as_dict() == {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "tokens": 8,
        "bytes": 4,
        "lossy_tokenizer": None,
    }
    assert math.isfinite(Evaluation(nats=1e9, n_labels=1, n_bytes=1).perplexity)


@pytest.mark.parametrize("size", [2, 3, 50])
def test_evaluation_over_ranks_equals_one_process(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = windows_of([7, 0, 4, 12, 1])
    alone = Scribe()
    whole = evaluate(alone, windows, precision=FP32)
    # Each rank's part of the loss, then the sum over ranks that every rank gets.
    monkeypatch.setattr("psannlm.runtime.distributed.dist.all_reduce", lambda tensor: None)
    scribes = [Scribe() for _ in range(size)]
    shares = [
        evaluate(scribe, windows, precision=FP32, batch_size=2, world=World(rank, rank, size)).nats
        for rank, scribe in enumerate(scribes)
    ]
    assert sum(shares) == whole.nats
    assert sorted(label for scribe in scribes for label in scribe.labels) == sorted(alone.labels)
    monkeypatch.setattr("psannlm.runtime.distributed.dist.all_reduce", lambda tensor: tensor.fill_(sum(shares)))
    for rank in range(size):
        assert evaluate(Scribe(), windows, precision=FP32, world=World(rank, rank, size)) == whole


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_disables_dropout_and_restores_mode(training: bool) -> None:
    scribe = Scribe().train(training)
    evaluate(scribe, windows_of([7]), precision=FP32)
    assert scribe.modes == {False}
    assert scribe.training is training


def test_evaluation_interrupted_restores_mode() -> None:
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    scribe = Scribe().train()
    with pytest.raises(KeyboardInterrupt):
        evaluate(scribe, windows_of([7]), precision=FP32, on_progress=interrupt)
    assert scribe.training


def test_evaluation_progress_ends_at_number_of_windows() -> None:
    windows = windows_of([7, 12])
    reported: list[Progress] = []
    evaluate(Scribe(), windows, precision=FP32, batch_size=2, on_progress=reported.append)
    assert [at.done for at in reported] == sorted({at.done for at in reported})
    assert (reported[-1].done, reported[-1].total) == (len(windows), len(windows))


def test_evaluation_uses_given_precision(build_tiny: Callable[..., Transformer]) -> None:
    model, windows = build_tiny(), windows_of([7, 12])
    seen: list[Any] = []
    model.blocks[0].mlp.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    low = evaluate(model, windows, precision=Precision(torch.device("cpu"), torch.bfloat16, "bf16 as asked"))
    exact = evaluate(model, windows, precision=FP32)
    assert seen == [torch.bfloat16, torch.float32]
    assert low.nats == pytest.approx(exact.nats, rel=0.02)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_evaluation_of_empty_text_raises(lengths: list[int]) -> None:
    with pytest.raises(CorpusError, match="no token"):
        evaluate(Scribe(), windows_of(lengths), precision=FP32)


def test_evaluation_windows_beyond_memory_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(d_model=1000, n_heads=1, d_mlp=2000)
    monkeypatch.setattr("psannlm.io.limits._physical_bytes", lambda: 10**9)

    class Many:
        seq_len = 1000

        def __len__(self) -> int:
            return 10**6

    windows: Any = Many()
    # 4 bytes of 4,000 features of 1,000 tokens: 16 MB a window.
    _refuse_oversize(config, windows, 60, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"64 windows of 1,000 tokens per pass need 1\.0 GB"):
        _refuse_oversize(config, windows, 64, torch.device("cpu"))
    with pytest.raises(ConfigError, match="1,000,000 windows of 1,000 tokens"):
        _refuse_oversize(config, windows, 10**12, torch.device("cpu"))


def test_evaluation_of_isolated_documents_equals_unpacked_windows(build_tiny: Callable[..., Transformer]) -> None:
    lengths = [7, 0, 4, 12, 1]
    model = build_tiny(max_seq_len=64)
    apart = evaluate(model, windows_of(lengths, 64, pack=False), precision=FP32)
    isolated = evaluate(model, windows_of(lengths, 64, isolate=True), precision=FP32)
    assert isolated.nats == pytest.approx(apart.nats, rel=1e-6)
    assert abs(evaluate(model, windows_of(lengths, 64), precision=FP32).nats - apart.nats) > 0.1

"""A tokenizer that loses text is told of, with what is lost and where, before anybody believes its bits per byte."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from psannlm.config.data import DataConfig, PathSource
from psannlm.config.model import ModelConfig
from psannlm.data.documents import Document
from psannlm.data.lossless import find_loss, watch_for_loss
from psannlm.data.prepare import prepare
from psannlm.device import pick_precision
from psannlm.evaluation import evaluate_sources
from psannlm.models.artifact import LoadedModel
from psannlm.models.registry import build_model, resolve
from psannlm.prep.run import SilentPrepReporter, prepare_corpus
from psannlm.prep.settings import PrepSettings
from psannlm.tokenizers.char import CharTokenizer


class Lowering(CharTokenizer):
    """Forgets which letters were large, as many a foreign tokenizer does."""

    def encode(self, text: str) -> list[int]:
        return super().encode(text.lower())


def test_what_is_lost_is_shown_where_it_is() -> None:
    text = "a" * 30 + "BCD" + "e" * 30
    assert find_loss(CharTokenizer("ä"), text + " ä 漢\0\r\n") is None
    assert (
        find_loss(Lowering(""), text) == f"{'a' * 12 + 'BCD' + 'e' * 9!r} comes back as {'a' * 12 + 'bcd' + 'e' * 9!r}"
    )


@pytest.mark.parametrize(("kept", "lost"), [("abc", "abcd"), ("", "x")])
def test_an_end_that_is_missing_is_lost_too(kept: str, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CharTokenizer, "decode", lambda self, ids: kept)
    assert find_loss(CharTokenizer(""), lost) == f"{lost!r} comes back as {kept!r}"


def test_documents_pass_and_one_warning_is_enough() -> None:
    documents = [Document(text, f"d{number}") for number, text in enumerate(["low", "High", "Higher"])]
    told: list[str] = []
    assert list(watch_for_loss(Lowering(""), documents, told.append)) == documents
    assert len(told) == 1
    assert "in d1, 'High' comes back as 'high'" in told[0]
    told.clear()
    assert list(watch_for_loss(CharTokenizer(""), documents, told.append)) == documents
    assert told == []


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of a tokenizer of Hugging Face's library that lowers text."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer(lowercase=True)
    made.train_from_iterator(
        ["some words and more words"] * 9, vocab_size=300, special_tokens=["<s>", "</s>", "<pad>", "<unk>"]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


class Notices(SilentPrepReporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def notice(self, text: str) -> None:
        self.said.append(text)


def warnings(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if "loses text" in line]


def test_training_preparing_and_evaluating_tell(foreign: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(4):
        (corpus / f"{number}.txt").write_text(f"{number}: Some Words and more words. " * 40)
    wanted = "'0: Some Words and more w' comes back as '0: some words and more w'"

    said: list[str] = []
    sources = (PathSource(path=str(corpus)),)
    prepared = prepare(DataConfig(sources=sources, tokenizer_model_path=str(foreign), max_length=16), said.append)
    assert len(warnings(said)) == 1
    assert wanted in warnings(said)[0]

    reporter = Notices()
    prepare_corpus([str(corpus)], foreign, tmp_path / "out", PrepSettings(), n_workers=1, reporter=reporter)
    assert len(warnings(reporter.said)) == 1
    assert str(corpus / "0.txt") in warnings(reporter.said)[0]
    assert wanted in warnings(reporter.said)[0]

    model = build_model(resolve(ModelConfig(d_model=8, n_layers=1, n_heads=1, vocab_size=400, max_seq_len=16)), seed=1)
    precision = pick_precision("fp32", torch.device("cpu"))
    _, report = evaluate_sources(LoadedModel(model, prepared.tokenizer, {}), sources, precision=precision)
    assert len(warnings(report.lines())) == 1
    assert wanted in warnings(report.lines())[0]
    _, report = evaluate_sources(LoadedModel(model, CharTokenizer(""), {}), sources, precision=precision)
    assert warnings(report.lines()) == []

"""Round-trip checks of lossy tokenizers, and their warnings in all commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from psannlm.config.data import DataConfig, PathSource
from psannlm.config.model import ModelConfig
from psannlm.data.corpus.documents import Document
from psannlm.data.manifest import SplitEntry, read_manifest
from psannlm.data.prepare import load_corpus
from psannlm.evaluation.loss import evaluate_sources
from psannlm.models.artifact import LoadedModel
from psannlm.models.registry import build_model, resolve
from psannlm.prep.job import PrepSettings
from psannlm.prep.merge import _lost_fraction, merge_parts
from psannlm.prep.pipeline import prepare_corpus
from psannlm.runtime.device import pick_precision
from psannlm.tokenizers.char import CharTokenizer
from psannlm.tokenizers.roundtrip import RoundTripMeter, check_roundtrip, find_roundtrip_error, is_lossy


class Lowering(CharTokenizer):
    """Forgets which letters were large, as many a foreign tokenizer does."""

    def encode(self, text: str) -> list[int]:
        return super().encode(text.lower())


def test_roundtrip_error_shows_first_difference() -> None:
    text = "a" * 30 + "BCD" + "e" * 30
    assert find_roundtrip_error(CharTokenizer("ä"), text + " ä 漢\0\r\n") is None
    assert (
        find_roundtrip_error(Lowering(""), text)
        == f"{'a' * 12 + 'BCD' + 'e' * 9!r} comes back as {'a' * 12 + 'bcd' + 'e' * 9!r}"
    )


@pytest.mark.parametrize(("kept", "lost"), [("abc", "abcd"), ("", "x")])
def test_an_end_that_is_missing_is_lost_too(kept: str, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CharTokenizer, "decode", lambda self, ids: kept)
    assert find_roundtrip_error(CharTokenizer(""), lost) == f"{lost!r} comes back as {kept!r}"


def test_roundtrip_check_warns_once_and_passes_documents() -> None:
    documents = [Document(text, f"d{number}") for number, text in enumerate(["low", "High", "Higher"])]
    notices: list[str] = []
    assert list(check_roundtrip(Lowering(""), documents, notices.append)) == documents
    assert len(notices) == 1
    assert "in d1, 'High' comes back as 'high'" in notices[0]
    notices.clear()
    assert list(check_roundtrip(CharTokenizer(""), documents, notices.append)) == documents
    assert notices == []


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


@pytest.mark.parametrize(
    ("text", "back", "lost"),
    [
        ("abc", "abc", 0),
        ("aBcB", "abcb", 2),
        ("a é漢b", "a b", 5),
        ("ab", "ba", 1),
        ("a  b", "a b", 1),
        ("ab", "abX", 1),
    ],
)
def test_roundtrip_counts_bytes_that_are_lost(text: str, back: str, lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CharTokenizer, "decode", lambda self, ids: back)
    meter = RoundTripMeter()
    assert (meter.check(CharTokenizer(""), text) is None) is (lost == 0)
    assert (meter.checked_bytes, meter.lost_bytes) == (len(text.encode()), lost)
    assert meter.fraction == pytest.approx(lost / len(text.encode()), abs=1e-6)


def test_roundtrip_smallest_loss_is_above_zero() -> None:
    assert RoundTripMeter().fraction is None
    assert RoundTripMeter(checked_bytes=10**12, lost_bytes=1).fraction == 1e-6
    assert [is_lossy(each) for each in (None, 0.0, 1e-6)] == [None, False, True]


@pytest.mark.slow
def test_roundtrip_merge_keeps_losses_of_parts(foreign: Path, tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    for number, text in enumerate(["Some Words here", "no capital here", "more words here"]):
        (tmp_path / f"{number}.txt").write_text(text * 3)
    settings = PrepSettings(val_split=0)
    folders = [tmp_path / f"part{index}" for index in (1, 2, 3)]
    for index, folder in enumerate(folders, start=1):
        prepare_corpus([str(tmp_path / "?.txt")], foreign, folder, settings, n_workers=1, part=(index, 3))
    lost = [read_manifest(folder).lost_fraction for folder in folders]
    assert sorted(each or 0 for each in lost) == [0, 0, pytest.approx(2 / 15, abs=1e-6)]
    logged.clear()
    merged = merge_parts(folders, tmp_path / "merged")
    assert merged.as_dict()["lossy_tokenizer"] is True
    assert read_manifest(tmp_path / "merged").lost_fraction == pytest.approx(2 / 45, abs=1e-6)
    assert len(warnings(logged.messages)) == 1


@pytest.mark.parametrize(
    ("parts", "whole"), [([0.0, 0.0], 0.0), ([None, 0.0], None), ([None, 0.5], 0.5), ([1e-6, 0.0], 1e-6)]
)
def test_roundtrip_unknown_part_keeps_other_losses(parts: list[float | None], whole: float | None) -> None:
    split = SplitEntry(documents=1, tokens=9, text_bytes=10, shards=())
    manifests: list[Any] = [SimpleNamespace(train=split, validation=split, lost_fraction=each) for each in parts]
    assert _lost_fraction(manifests) == (None if whole is None else pytest.approx(whole, abs=1e-9))


def warnings(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if "loses text" in line]


def test_lossy_tokenizer_warns_in_train_prep_eval(
    foreign: Path, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(4):
        (corpus / f"{number}.txt").write_text(f"{number}: Some Words and more words. " * 40)
    wanted = "'0: Some Words and more w' comes back as '0: some words and more w'"

    sources = (PathSource(path=str(corpus)),)
    prepared = load_corpus(DataConfig(sources=sources, tokenizer_model_path=str(foreign), max_length=16))
    assert len(warnings(logged.messages)) == 1
    assert wanted in warnings(logged.messages)[0]

    logged.clear()
    prepare_corpus([str(corpus)], foreign, tmp_path / "out", PrepSettings(), n_workers=1)
    assert len(warnings(logged.messages)) == 1
    assert str(corpus / "0.txt") in warnings(logged.messages)[0]
    assert wanted in warnings(logged.messages)[0]

    model = build_model(resolve(ModelConfig(d_model=8, n_layers=1, n_heads=1, vocab_size=400, max_seq_len=16)), seed=1)
    precision = pick_precision("fp32", torch.device("cpu"))
    found, report = evaluate_sources(LoadedModel(model, prepared.tokenizer, {}), sources, precision=precision)
    assert len(warnings(report.lines())) == 1
    assert wanted in warnings(report.lines())[0]
    assert found.as_dict()["lossy_tokenizer"] is True
    found, report = evaluate_sources(LoadedModel(model, CharTokenizer(""), {}), sources, precision=precision)
    assert warnings(report.lines()) == []
    assert found.as_dict()["lossy_tokenizer"] is False

    # The folder keeps what was seen when it was made, and everything that reads it warns again.
    folder = tmp_path / "out"
    shards = (PathSource(path=str(folder)),)
    logged.clear()
    made = load_corpus(DataConfig(sources=shards, max_length=16))
    assert len(warnings(logged.messages)) == 1
    assert (
        f"{folder} was prepared with a tokenizer that loses text, {2 / 30:.2%} of the bytes"
        in warnings(logged.messages)[0]
    )
    assert made.lost_fraction == prepared.lost_fraction == pytest.approx(2 / 30, abs=0.002)
    found, report = evaluate_sources(LoadedModel(model, prepared.tokenizer, {}), shards, precision=precision)
    assert len(warnings(report.lines())) == 1
    assert found.as_dict()["lossy_tokenizer"] is True

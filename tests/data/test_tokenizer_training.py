"""Fitting a tokenizer with a card: sampling, held-out text and figures."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from psannlm.config.data import PathSource
from psannlm.data.corpus.documents import Document, read_documents
from psannlm.data.tokenizer_training import (
    SAMPLE_SEGMENT_BYTES,
    fit_with_card,
    held_out_figures,
    longest_pieces,
    sample_corpus,
)
from psannlm.errors import CorpusError, StorageError
from psannlm.runtime.progress import Progress
from psannlm.tokenizers.char import CharTokenizer


def documents(count: int) -> list[Document]:
    return [Document(f"text {i:05d}", str(i)) for i in range(count)]


def test_fit_holds_out_a_tenth_without_overlap() -> None:
    sampled = sample_corpus(documents(2000), seed=1)
    assert set(sampled.held_out).isdisjoint(sampled.fitted_on)
    assert len(sampled.held_out) + len(sampled.fitted_on) == 2000
    assert 150 < len(sampled.held_out) < 250


def test_fit_held_out_text_depends_on_seed_and_text() -> None:
    given = documents(500)
    sampled = sample_corpus(given, seed=1)
    random.Random(0).shuffle(given)
    assert set(sample_corpus(given, seed=1).held_out) == set(sampled.held_out)
    assert set(sample_corpus(given, seed=2).held_out) != set(sampled.held_out)
    twice = sample_corpus([*given, *given], seed=1)
    assert set(twice.held_out).isdisjoint(twice.fitted_on), "equal documents fall on one side"


@pytest.mark.parametrize("count", [2, 3, 5, 9])
@pytest.mark.parametrize("seed", range(6))
def test_neither_side_is_ever_empty_nor_anything_lost(count: int, seed: int) -> None:
    sampled = sample_corpus(documents(count), seed=seed)
    assert sampled.held_out
    assert sampled.fitted_on
    assert sorted(sampled.held_out + sampled.fitted_on) == [document.text for document in documents(count)]


def test_single_document_is_cut_in_two() -> None:
    sampled = sample_corpus([Document("word " * 100, "one")], seed=0)
    assert "".join(sampled.fitted_on + sampled.held_out) == "word " * 100
    assert len(sampled.held_out[0]) < 100
    with pytest.raises(CorpusError, match="too few to hold out"):
        sample_corpus([Document("a", "one")], seed=0)


def test_fit_sample_is_bounded_and_seeded(logged: pytest.LogCaptureFixture) -> None:
    given = documents(4000)
    sampled = sample_corpus(given, seed=3, sample_chars=4000)
    assert sum(map(len, sampled.fitted_on)) == 4000
    assert sampled == sample_corpus(given, seed=3, sample_chars=4000)
    assert sampled.fitted_on != sample_corpus(given, seed=4, sample_chars=4000).fitted_on
    quarters = [
        sum(start <= int(text[5:]) < start + 1000 for text in sampled.fitted_on) for start in range(0, 4000, 1000)
    ]
    assert all(65 < quarter < 135 for quarter in quarters), quarters
    assert "random sample of 4,000" in logged.messages[0]


def test_fit_long_file_is_cut_into_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psannlm.data.tokenizer_training.SAMPLE_SEGMENT_BYTES", 2000)
    path = tmp_path / "long.txt"
    path.write_text("".join(f"Zeile {i}: Übermaß an Wörtern, immer wieder.\n" for i in range(2000)), encoding="utf-8")
    read: list[Progress] = []
    card = fit_with_card(
        [PathSource(path=str(path))], backend="simple", out=tmp_path / "t",
        on_progress=read.append,
    )  # fmt: skip
    size = path.stat().st_size
    assert (card.corpus_documents, card.corpus_bytes) == (1, size)
    assert (read[-1].done, read[-1].total, read[-1].unit) == (size, size, "bytes")
    assert card.held_out_is_lossless
    assert 0.02 < card.held_out_bytes / size < 0.25
    assert json.loads(Path(card.card).read_text())["fingerprint"] == card.fingerprint


def test_fit_unwritable_out_raises_before_reading(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("mine")
    sources = [PathSource(path=str(tmp_path / "missing.txt"))]
    with pytest.raises(StorageError, match="a file is in the place of a folder"):
        fit_with_card(sources, out=tmp_path / "file" / "t.model")
    assert logged.messages == []


def test_fit_cards_of_model_and_json_are_distinct(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of some text\n" for i in range(300)), encoding="utf-8")
    sources = [PathSource(path=str(path))]
    cards = [
        fit_with_card(sources, backend=backend, vocab_size=300, out=tmp_path / name)
        for backend, name in (("sentencepiece", "t.model"), ("tokenizers", "t.json"))
    ]
    for card in cards:
        assert json.loads(Path(card.card).read_text())["fingerprint"] == card.fingerprint


def test_figures_by_hand() -> None:
    tokenizer = CharTokenizer("é")
    figures = held_out_figures(tokenizer, ["aé", "ñ"])  # one id, one id; two bytes
    assert figures["held_out_bytes"] == 5
    assert figures["held_out_tokens"] == 4
    assert figures["held_out_bytes_per_token"] == 1.25
    assert figures["held_out_byte_fallback_share"] == 0.5
    assert figures["held_out_is_lossless"]


def test_tokenizer_card_reports_round_trip_loss() -> None:
    class Lossy(CharTokenizer):
        def decode(self, ids):  # type: ignore[no-untyped-def]
            return super().decode(ids).replace("  ", " ")

    assert not held_out_figures(Lossy(""), ["fine", "a  b"])["held_out_is_lossless"]


def test_longest_pieces_come_first() -> None:
    from psannlm.tokenizers.resolve import fit_tokenizer

    tokenizer = fit_tokenizer(["wonderful wonder " * 50], "tokenizers", 300)
    found = longest_pieces(tokenizer, 3)
    assert found[0] == " wonderful"
    assert [len(piece) for piece in found] == sorted(map(len, found), reverse=True)


@pytest.mark.parametrize("n_bytes", [2_000, 70_000, 300_000, 1_100_000, 2_100_000, 4_000_000])
def test_about_a_tenth_of_one_file_is_held_out(tmp_path: Path, n_bytes: int) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {number} of waves that rise and fall\n" for number in range(n_bytes // 38)))
    for seed in (1, 2, 3):
        documents = read_documents([PathSource(path=str(path))], segment_bytes=SAMPLE_SEGMENT_BYTES)
        sampled = sample_corpus(documents, seed=seed)
        sizes = [sum(map(len, passages)) for passages in (sampled.fitted_on, sampled.held_out)]
        assert 0.08 < sizes[1] / path.stat().st_size < 0.2
        assert sum(sizes) == len(path.read_text())

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from psannlm.errors import ConfigError, CorpusError, TokenizerError
from psannlm.tokenizers import resolve
from psannlm.tokenizers.base import MIN_VOCAB_SIZE, Tokenizer
from psannlm.tokenizers.resolve import (
    available_backends,
    fit_tokenizer,
    load_tokenizer,
    resolve_backend,
    tokenizer_from_bytes,
)

BACKENDS = ("sentencepiece", "tokenizers", "simple")
KINDS = ("sentencepiece", "sentencepiece bpe", "tokenizers", "simple")
PROSE = ["The quick brown fox jumps over the lazy dog, and the dog sleeps.\n" * 30]


def test_auto_takes_the_first_that_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_backend("auto") == "sentencepiece"
    assert fit_tokenizer(PROSE, vocab_size=300).backend == "sentencepiece"
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert fit_tokenizer(PROSE, vocab_size=300).backend == "tokenizers"
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert fit_tokenizer(PROSE, vocab_size=300).backend == "simple"
    available = available_backends()
    assert list(available) == list(BACKENDS)
    assert available["simple"] is None
    assert "sentencepiece" in str(available["sentencepiece"])


def test_auto_does_not_fall_back_on_other_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        if name == "sentencepiece":
            raise RuntimeError("broken installation")
        return importlib.import_module(name)

    monkeypatch.setattr(resolve, "import_module", broken)
    with pytest.raises(RuntimeError, match="broken installation"):
        resolve_backend("auto")


@pytest.mark.parametrize("backend", ["sentencepiece", "tokenizers"])
def test_a_backend_asked_for_by_name_is_never_replaced(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = fit_tokenizer(PROSE, backend, 300).to_bytes()
    monkeypatch.setitem(sys.modules, backend, None)
    with pytest.raises(TokenizerError, match=f"needs the package '{backend}'"):
        fit_tokenizer(PROSE, backend, 300)
    with pytest.raises(TokenizerError, match=f"needs the package '{backend}'"):
        tokenizer_from_bytes(content)


def test_an_unknown_backend_names_its_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"unknown tokenizer 'sentencepeice' \(did you mean 'sentencepiece'\?\)"):
        resolve_backend("sentencepeice")


def fit(texts: Iterable[str], kind: str, vocab_size: int, **named: Any) -> Tokenizer:
    backend, _, model_type = kind.partition(" ")
    return fit_tokenizer(texts, backend, vocab_size, model_type=model_type or None, **named)


@pytest.mark.parametrize("kind", KINDS)
class TestFit:
    def test_the_same_input_gives_the_same_bytes(self, kind: str, corpus: list[str]) -> None:
        first, second = (fit(iter(corpus), kind, 400, seed=3) for _ in range(2))
        assert first.to_bytes() == second.to_bytes()
        assert first.fingerprint == hashlib.sha256(first.to_bytes()).hexdigest()
        assert first.fingerprint != fit([*corpus, "ŵ" * 500], kind, 400).fingerprint

    @pytest.mark.parametrize("text", ["a", "ab", "\0", "▅", "▁", "\uf8f0", "é", "\n\n a", "\0\0 \0"])
    def test_tiny_corpus_fits_fewer_entries_with_a_notice(
        self, kind: str, text: str, logged: pytest.LogCaptureFixture
    ) -> None:
        tokenizer = fit([text], kind, 4096)
        assert 260 <= tokenizer.vocab_size < 300
        assert logged.messages == [f"the corpus fills {tokenizer.vocab_size} of the 4,096 vocabulary entries asked for"]
        assert tokenizer.decode(tokenizer.encode(text + "日")) == text + "日"

    def test_a_full_vocabulary_gives_no_notice(self, kind: str, logged: pytest.LogCaptureFixture) -> None:
        tokenizer = fit([*PROSE, "äöüß"], kind, MIN_VOCAB_SIZE)
        assert tokenizer.vocab_size == MIN_VOCAB_SIZE
        assert not logged.messages

    @pytest.mark.parametrize("texts", [[], [""], [" \n\t "], ["", "\u3000"]])
    def test_an_empty_or_blank_corpus_is_an_error(self, kind: str, texts: list[str]) -> None:
        with pytest.raises(CorpusError, match="Check the configured sources"):
            fit(texts, kind, 300)

    def test_vocabulary_smaller_than_the_byte_entries_is_refused(self, kind: str) -> None:
        with pytest.raises(ConfigError, match=r"vocab_size 260 is too small: .* take 261"):
            fit(PROSE, kind, 260)

    def test_a_very_long_line_is_learned_from(self, kind: str) -> None:
        # SentencePiece passes over sentences longer than a limit, 4,192 bytes by default.
        long_line = "wonderful über " * 20_000
        tokenizer = fit([long_line], kind, 300)
        budget = {"simple": len("wonderful über ")}.get(kind, 6)
        assert len(tokenizer.encode(" wonderful über")) <= budget

    @pytest.mark.parametrize("cut", [0.1, 0.5, 0.9])
    def test_a_file_cut_short_is_refused_with_its_path(self, kind: str, cut: float, tmp_path: Path) -> None:
        content = fit([*PROSE, "é"], kind, 300).to_bytes()
        path = tmp_path / "cut.model"
        path.write_bytes(content[: int(len(content) * cut)])
        refused(path)


@pytest.mark.parametrize(
    ("backend", "model_type", "says"),
    [("sentencepiece", "bep", "did you mean 'bpe'"), ("simple", "bpe", "'simple' has only one type")],
)
def test_a_model_type_that_is_not_there_is_refused(backend: str, model_type: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        fit_tokenizer(PROSE, backend, 300, model_type=model_type)
    with pytest.raises(ConfigError, match="sample_chars 0 is too small"):
        fit_tokenizer(PROSE, backend, 300, sample_chars=0)


def test_sentencepiece_model_types_are_as_requested(corpus: list[str]) -> None:
    for model_type in ("unigram", "bpe"):
        content = fit_tokenizer(corpus, "sentencepiece", 300, model_type=model_type).to_bytes()
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
        # BPE scores a piece by the number of its merge, a unigram model by the logarithm of its probability.
        scores = [model.get_score(i) for i in range(260, model.vocab_size())]
        assert all(score == round(score) for score in scores) == (model_type == "bpe")


def refused(path: Path) -> str:
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"{}", "unknown kind"),
        (b'{"format": "psannlm-chart"}', "unknown kind"),
        (b'{"format": "psannlm-char", "version": 9}', "version 9"),
        (b'{"a": ', "damaged JSON"),
        (b"{\xff}", "damaged JSON"),
        (b"just some words", "SentencePiece"),
        (b"\x80\x04\x95pickle", "SentencePiece"),
        (b"PK\x03\x04 an archive", "SentencePiece"),
        (b"\x0a\x00", "SentencePiece"),
        (b" ", "SentencePiece"),
        (bytes(range(256)), "SentencePiece"),
    ],
)
def test_other_files_are_refused_in_one_line(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    assert says in refused(path)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "absent.model")
    refused(tmp_path)


def test_the_kind_comes_from_the_bytes_not_the_name(tmp_path: Path) -> None:
    for backend in BACKENDS:
        fitted: Tokenizer = fit_tokenizer(PROSE, backend, 300)
        assert load_tokenizer(fitted.save(tmp_path / "any.name")).backend == backend

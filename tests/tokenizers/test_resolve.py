from __future__ import annotations

import hashlib
import importlib
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("backend", BACKENDS)
class TestFit:
    def test_the_same_input_gives_the_same_bytes(self, backend: str, corpus: list[str]) -> None:
        first, second = (fit_tokenizer(iter(corpus), backend, 400, seed=3) for _ in range(2))
        assert first.to_bytes() == second.to_bytes()
        assert first.fingerprint == hashlib.sha256(first.to_bytes()).hexdigest()
        assert first.fingerprint != fit_tokenizer([*corpus, "ŵ" * 500], backend, 400).fingerprint

    @pytest.mark.parametrize("text", ["a", "ab", "\0", "▅", "▁", "\uf8f0", "é", "\n\n a", "\0\0 \0"])
    def test_a_tiny_corpus_gives_a_small_vocabulary_and_a_notice(self, backend: str, text: str) -> None:
        told: list[str] = []
        tokenizer = fit_tokenizer([text], backend, 4096, notice=told.append)
        assert 260 <= tokenizer.vocab_size < 300
        assert told == [f"the corpus fills {tokenizer.vocab_size} of the 4,096 vocabulary entries asked for"]
        assert tokenizer.decode(tokenizer.encode(text + "日")) == text + "日"

    def test_a_full_vocabulary_gives_no_notice(self, backend: str) -> None:
        told: list[str] = []
        tokenizer = fit_tokenizer([*PROSE, "äöüß"], backend, MIN_VOCAB_SIZE, notice=told.append)
        assert tokenizer.vocab_size == MIN_VOCAB_SIZE
        assert not told

    @pytest.mark.parametrize("texts", [[], [""], [" \n\t "], ["", "\u3000"]])
    def test_an_empty_or_blank_corpus_is_an_error(self, backend: str, texts: list[str]) -> None:
        with pytest.raises(CorpusError, match="Check the sources"):
            fit_tokenizer(texts, backend, 300)

    def test_a_vocabulary_without_room_for_the_bytes_is_an_error(self, backend: str) -> None:
        with pytest.raises(ConfigError, match=r"vocab_size 260 is too small: .* take 261"):
            fit_tokenizer(PROSE, backend, 260)

    def test_a_very_long_line_is_learned_from(self, backend: str) -> None:
        # SentencePiece passes over sentences longer than a limit, 4,192 bytes by default.
        long_line = "wonderful über " * 20_000
        tokenizer = fit_tokenizer([long_line], backend, 300)
        budget = {"simple": len("wonderful über ")}.get(backend, 6)
        assert len(tokenizer.encode(" wonderful über")) <= budget

    @pytest.mark.parametrize("cut", [0.1, 0.5, 0.9])
    def test_a_file_cut_short_is_refused_with_its_path(self, backend: str, cut: float, tmp_path: Path) -> None:
        content = fit_tokenizer([*PROSE, "é"], backend, 300).to_bytes()
        path = tmp_path / "cut.model"
        path.write_bytes(content[: int(len(content) * cut)])
        refused(path)


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

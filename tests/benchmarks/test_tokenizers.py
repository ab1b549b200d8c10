"""The figures of a tokenizer are those that can be worked out by hand; the raw library beside it does the same work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from psannlm.benchmarks import tokenizers as bench
from psannlm.benchmarks.timing import Spread
from psannlm.config.data import PathSource
from psannlm.data.documents import Document
from psannlm.errors import ConfigError
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import available_backends, fit_tokenizer, load_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLE = REPOSITORY / "examples" / "lm" / "sample_texts.txt"


class PairTokenizer(Tokenizer):
    """An id for every two characters; encoding a character takes 1 s, decoding an id 3 s. Upper case is lost."""

    backend = "pairs"
    vocab_size = 1000
    pad_id, bos_id, eos_id, unk_id = range(4)

    def __init__(self) -> None:
        self.now = 0.0
        self.known: list[str] = []

    def clock(self) -> float:
        return self.now

    def encode(self, text: str) -> list[int]:
        self.now += len(text)
        ids = []
        for start in range(0, len(text), 2):
            piece = text[start : start + 2].lower()
            if piece not in self.known:
                self.known.append(piece)
            ids.append(4 + self.known.index(piece))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        self.now += 3 * len(ids)
        return "".join(self.known[i - 4] for i in ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self.known[i - 4] for i in ids]

    def to_bytes(self) -> bytes:
        return b"pairs"


def measure(documents: list[Document]) -> bench.TokenizerFigures:
    tokenizer = PairTokenizer()
    fit_s = {"mine": Spread(7.0, 6.0, 8.0)}
    (figures,) = bench.measure_tokenizers(
        {"mine": tokenizer}, documents, fit_s=fit_s, repeats=3, clock=tokenizer.clock, min_run_s=1.0
    )
    return figures


def test_figures_by_hand() -> None:
    # 4 + 5 characters, one of them two bytes: 10 bytes, 2 + 3 ids; 9 s to encode, 15 s to decode.
    figures = measure([Document("abab", "one"), Document("cdéfg", "two")])
    assert (figures.n_bytes, figures.n_tokens, figures.bytes_per_token) == (10, 5, 2.0)
    assert figures.encode_s == Spread(9.0, 9.0, 9.0)
    assert figures.decode_s == Spread(15.0, 15.0, 15.0)
    assert figures.mb_per_s(figures.encode_s) == pytest.approx(10 / 9 / 1e6)
    assert figures.tokens_per_s(figures.decode_s) == pytest.approx(5 / 15)
    assert (figures.fit_s, figures.vocab_size, figures.model_bytes) == (Spread(7.0, 6.0, 8.0), 1000, 5)
    assert figures.is_lossless
    assert figures.raw_encode_s is figures.ratio_to_raw is figures.same_ids_as_raw is None
    plain = figures.as_dict()
    assert plain["encode_tokens_per_s"] == pytest.approx(5 / 9)
    assert plain["decode_mb_per_s"] == pytest.approx(10 / 15 / 1e6)
    assert plain["fit_s"] == {"median": 7.0, "lowest": 6.0, "highest": 8.0}


def test_a_loss_names_the_document() -> None:
    figures = measure([Document("abab", "one"), Document("abAB", "two"), Document("CD", "three")])
    assert not figures.is_lossless
    assert figures.lost == "two"


@pytest.mark.parametrize("backend", ["sentencepiece", "tokenizers"])
def test_the_raw_library_does_the_same_work(backend: str, tiny_texts: list[str]) -> None:
    tokenizer = fit_tokenizer(tiny_texts, backend, 300)
    raw = bench.raw_encode(tokenizer)
    assert raw is not None
    assert raw(tiny_texts) == tokenizer.encode_batch(tiny_texts)
    documents = [Document(text, str(i)) for i, text in enumerate(tiny_texts)]
    (figures,) = bench.measure_tokenizers({"x": tokenizer}, documents, fit_s={}, repeats=2, min_run_s=0.0)
    assert figures.same_ids_as_raw
    assert figures.fit_s is None


def test_the_ratio_is_our_rate_over_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = PairTokenizer()

    def twice_as_fast(texts: Sequence[str]) -> list[list[int]]:
        before = tokenizer.now
        ids = tokenizer.encode_batch(texts)
        tokenizer.now = before + (tokenizer.now - before) / 2
        return [row[::-1] for row in ids]

    monkeypatch.setattr(bench, "raw_encode", lambda _: twice_as_fast)
    (figures,) = bench.measure_tokenizers(
        {"mine": tokenizer}, [Document("abcd", "one")], fit_s={}, repeats=2, clock=tokenizer.clock
    )
    assert figures.ratio_to_raw == Spread(0.5, 0.5, 0.5)
    assert figures.same_ids_as_raw is False, "the ids came back reversed"


def test_every_backend_is_measured_on_text_that_none_was_fitted_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fitted_on: list[str] = []
    real = bench.fit_tokenizer

    def spy(texts: Sequence[str], *rest: object, **named: object) -> Tokenizer:
        fitted_on.extend(texts)
        return real(texts, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(bench, "fit_tokenizer", spy)
    measured: list[Document] = []
    keep = bench.measure_tokenizers

    def watch(tokenizers: object, documents: list[Document], **named: object) -> object:
        measured.extend(documents)
        return keep(tokenizers, documents, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(bench, "measure_tokenizers", watch)
    own = fit_tokenizer(["abc abd"], "simple").save(tmp_path / "own.json")
    notices: list[str] = []
    report = bench.bench_tokenizers(
        [PathSource(path=str(SAMPLE), per_line=True)],
        models=[own],
        vocab_size=300,
        repeats=2,
        min_run_s=0.0,
        notice=notices.append,
    )
    assert [row.name for row in report.tokenizers] == [*available_backends(), str(own)]
    assert report.held_out.documents == len(measured) == 1
    assert not {document.text for document in measured} & set(fitted_on)
    assert report.held_out.bytes == sum(document.n_bytes for document in measured)
    assert report.tokenizers[-1].fit_s is None
    assert all(row.is_lossless for row in report.tokenizers)
    assert len(notices) == len(set(notices)), "what fitting says is said once, however often it is repeated"


def test_fits_of_one_backend_are_one_model_and_timed_on_the_clock(tiny_texts: list[str]) -> None:
    ticks = iter(range(10_000))
    fitted, seconds = bench.fit_in_turns(
        ["simple"], tiny_texts, vocab_size=300, repeats=2, clock=lambda: float(next(ticks))
    )
    assert fitted["simple"].fingerprint == fit_tokenizer(tiny_texts, "simple", 300).fingerprint
    assert seconds["simple"] == Spread(1.0, 1.0, 1.0)


def test_held_out_text_that_the_fit_saw_is_told() -> None:
    source = PathSource(path=str(SAMPLE))
    report = bench.bench_tokenizers([source], held_out=[source], vocab_size=300, repeats=1, min_run_s=0.0)
    assert report.held_out.overlap > 0.5
    assert report.held_out.sha256 == report.corpus_sha256


def test_a_file_named_twice_is_refused(tmp_path: Path) -> None:
    path = fit_tokenizer(["abc"], "simple").save(tmp_path / "t.json")
    assert load_tokenizer(path).backend == "simple"
    with pytest.raises(ConfigError, match=r"t\.json is named twice"):
        bench.load_named([path, path])

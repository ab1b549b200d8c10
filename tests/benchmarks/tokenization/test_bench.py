"""Tokenizer benchmark: known values, losslessness, threads, and the raw libraries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from psannlm.benchmarks.tokenization import bench as bench
from psannlm.config.data import PathSource
from psannlm.errors import ConfigError
from psannlm.reports.schemas.measured import Spread
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import fit_tokenizer, load_tokenizer

REPOSITORY = Path(__file__).resolve().parents[3]
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

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        self.now += 3 * len(ids)
        return "".join(self.known[i - 4] for i in ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self.known[i - 4] for i in ids]

    def to_bytes(self) -> bytes:
        return b"pairs"


class Here:
    """Calls a bench in this process, on the tokenizer's own clock."""

    def __init__(self, bench_: bench.Bench) -> None:
        self.bench = bench_

    def call(self, method: str, *arguments: object) -> object:
        return getattr(self.bench, method)(*arguments)


def measure(
    texts: list[str], monkeypatch: pytest.MonkeyPatch, tokenizer: PairTokenizer | None = None
) -> bench.TokenizerFigures:
    tokenizer = tokenizer or PairTokenizer()
    monkeypatch.setattr(bench, "tokenizer_from_bytes", lambda content: tokenizer)
    fits = {"mine": [bench.Fitted(seconds, b"pairs", peak, ()) for seconds, peak in ((6.0, 5), (8.0, 9), (7.0, 4))]}
    (figures,) = bench.measure_tokenizers(
        {"mine": tokenizer},
        texts,
        fits=fits,
        repeats=3,
        min_run_s=1.0,
        start=lambda content, held_out, threads: Here(bench.Bench(content, held_out, threads, tokenizer.clock)),
    )
    return figures


@pytest.mark.slow
def test_tokenizer_figures_known_values(monkeypatch: pytest.MonkeyPatch) -> None:
    # 4 + 5 characters, one of them two bytes: 10 bytes, 2 + 3 ids; 9 s to encode, 15 s to decode.
    figures = measure(["abab", "cdéfg"], monkeypatch)
    assert (figures.n_bytes, figures.n_tokens, figures.bytes_per_token) == (10, 5, 2.0)
    for speed in (figures.one_thread, figures.all_threads):
        assert speed.encode_s == Spread(9.0, 9.0, 9.0)
        assert speed.decode_s == Spread(15.0, 15.0, 15.0)
        assert speed.raw_encode_s is speed.ratio_to_raw is None
        assert speed.peak_bytes > 0
    assert figures.mb_per_s(figures.one_thread.encode_s) == pytest.approx(10 / 9 / 1e6)
    assert figures.tokens_per_s(figures.one_thread.decode_s) == pytest.approx(5 / 15)
    assert (figures.fit_s, figures.fit_peak_bytes) == (Spread(7.0, 6.0, 8.0), 9)
    assert (figures.vocab_size, figures.model_bytes) == (1000, 5)
    assert figures.is_lossless
    assert figures.same_ids_as_raw is None
    plain = figures.as_dict()
    assert plain["encode_tokens_per_s"] == plain["one_thread"]["encode_tokens_per_s"] == pytest.approx(5 / 9)
    assert plain["all_threads"]["decode_mb_per_s"] == pytest.approx(10 / 15 / 1e6)
    assert plain["fit_s"] == {"median": 7.0, "lowest": 6.0, "highest": 8.0}


@pytest.mark.slow
def test_lost_text_is_excerpted(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = measure(["abab", "abAB", "CD"], monkeypatch)
    assert not figures.is_lossless
    assert figures.lost == "'abAB'"
    assert measure(["x" * 100 + "Y" + "z" * 100], monkeypatch).lost == repr("x" * 20 + "Y" + "z" * 19)


@pytest.mark.slow
def test_measure_tokenizers_uses_one_and_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(PairTokenizer):
        def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
            before = self.now
            rows = super().encode_batch(texts)
            self.now = before + (self.now - before) / (1 if threads == 1 else 4)
            return rows

    figures = measure(["abcd"], monkeypatch, Counting())
    assert (figures.one_thread.encode_s.median, figures.all_threads.encode_s.median) == (4.0, 1.0)


@pytest.mark.parametrize("backend", ["sentencepiece", "tokenizers"])
def test_raw_library_gives_the_same_ids(backend: str, tiny_texts: list[str]) -> None:
    tokenizer = fit_tokenizer(tiny_texts, backend, 300)
    for threads in (0, 1):
        raw = bench.raw_encode(tokenizer, threads)
        assert raw is not None
        assert raw(tiny_texts) == tokenizer.encode_batch(tiny_texts)


@pytest.mark.slow
def test_ratio_to_raw_is_our_throughput_over_library(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = PairTokenizer()

    def twice_as_fast(texts: Sequence[str]) -> list[list[int]]:
        before = tokenizer.now
        ids = tokenizer.encode_batch(texts)
        tokenizer.now = before + (tokenizer.now - before) / 2
        return [row[::-1] for row in ids]

    monkeypatch.setattr(bench, "raw_encode", lambda *_: twice_as_fast)
    figures = measure(["abcd"], monkeypatch, tokenizer)
    assert figures.one_thread.ratio_to_raw == figures.all_threads.ratio_to_raw == Spread(0.5, 0.5, 0.5)
    assert figures.same_ids_as_raw is False, "the ids came back reversed"


@pytest.mark.slow
def test_bench_tokenizers_measures_on_held_out_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    seen: dict[str, list[str]] = {}
    fit, measured = bench.fit_interleaved, bench.measure_tokenizers

    def watch_fit(kinds: list[str], passages: list[str], **named: object) -> object:
        seen["fitted on"] = passages
        return fit(kinds, passages, **named)  # type: ignore[arg-type]

    def watch_measure(tokenizers: object, texts: list[str], **named: object) -> object:
        seen["measured on"] = texts
        return measured(tokenizers, texts, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(bench, "fit_interleaved", watch_fit)
    monkeypatch.setattr(bench, "measure_tokenizers", watch_measure)
    own = fit_tokenizer(["abc abd"], "simple").save(tmp_path / "own.json")
    report = bench.bench_tokenizers(
        [PathSource(path=str(SAMPLE), per_line=True)],
        models=[own],
        vocab_size=300,
        repeats=1,
        min_run_s=0.0,
    )
    assert [row.name for row in report.tokenizers] == [*bench.KINDS, str(own)]
    assert set(seen["measured on"]).isdisjoint(seen["fitted on"])
    assert report.held_out.passages == len(seen["measured on"]) >= 1
    assert report.held_out.bytes == sum(len(text.encode()) for text in seen["measured on"])
    assert report.tokenizers[-1].fit_s is report.tokenizers[-1].fit_peak_bytes is None
    for row in report.tokenizers:
        assert row.is_lossless
        assert row.same_ids_as_raw is (None if row.backend == "simple" else True)
        # A process of its own holds Python and a library, not what this one holds.
        assert 10e6 < row.all_threads.peak_bytes < 200e6
    assert len({row.model_bytes for row in report.tokenizers[:2]}) == 2, "unigram and BPE are two models"
    assert len(logged.messages) == len(set(logged.messages)) > 0, (
        "what fitting says is said once, however often it is repeated"
    )


def test_load_named_duplicate_path_raises(tmp_path: Path) -> None:
    path = fit_tokenizer(["abc"], "simple").save(tmp_path / "t.json")
    assert load_tokenizer(path).backend == "simple"
    with pytest.raises(ConfigError, match=r"t\.json is named twice"):
        bench.load_named([path, path])

"""A corpus in; for each tokenizer backend side by side how fast, how dense and how true it is on held-out text, out.

Every fit, and every tokenizer at every number of threads, has a process of its own: peaks of memory are its own, and
Hugging Face's library reads its number of threads only once. The processes take turns; one works at a time.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from psannlm.benchmarks.harness.interleaved import (
    Clock,
    Count,
    Progress,
    Spread,
    paired_ratio,
    passes_for,
    run_interleaved,
)
from psannlm.benchmarks.harness.isolated_process import IsolatedProcess
from psannlm.benchmarks.tokenization.prep import PrepFigures, bench_prep, check_preparable
from psannlm.benchmarks.tokenization.raw_libraries import raw_encode
from psannlm.config.data import Source
from psannlm.data.corpus.documents import Document, ReadReport, read_documents
from psannlm.data.prepare import shared_text
from psannlm.data.tokenizer_training import SAMPLE_SEGMENT_BYTES, sample_corpus
from psannlm.errors import ConfigError
from psannlm.runtime.device import peak_resident_bytes
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import (
    available_backends,
    check_fit,
    fit_passages,
    load_tokenizer,
    tokenizer_from_bytes,
)
from psannlm.tokenizers.sample import SAMPLE_CHARS, sample_passages

# A row of the table -> backend and model type.
KINDS: dict[str, tuple[str, str | None]] = {
    "sentencepiece unigram": ("sentencepiece", "unigram"),
    "sentencepiece bpe": ("sentencepiece", "bpe"),
    "byte-level bpe": ("tokenizers", None),
    "characters": ("simple", None),
}
# Enough for rates to settle, little enough to be held by every process.
HELD_OUT_CHARS = 4_000_000
# What a small corpus is repeated up to: SentencePiece fits on so much in ten seconds, and rates settle on less.
REPEATED_CHARS = 1_000_000
# Of a small text one pass takes a millisecond or two: a run makes as many as fill this time.
MIN_RUN_S = 0.1
_EXCERPT_CHARS = 20
# What the libraries read their number of threads from, when they are loaded.
_ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
_ALL_THREADS = {"TOKENIZERS_PARALLELISM": "true"}

Texts = Sequence[str]


@dataclass(frozen=True)
class HeldOut:
    """The text that everything but fitting is measured on.

    Attributes:
        passages, bytes: repetitions included.
        sha256: of the text before it is repeated.
        overlap: the fraction of it that the fit saw too.
        repeat: how many times it is repeated.
    """

    passages: int
    bytes: int
    sha256: str
    overlap: float
    repeat: int = 1


@dataclass(frozen=True)
class Fitted:
    """A fit: seconds, the tokenizer's file, the highest memory of the process that fitted it, and what it said."""

    seconds: float
    content: bytes
    peak_bytes: int
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """What does not depend on the clock: ids, what is lost, whether the raw library gives the same ids."""

    n_tokens: int
    lost: str | None
    same_ids_as_raw: bool | None
    peak_bytes: int


@dataclass(frozen=True)
class Speed:
    """A tokenizer at one number of threads.

    Attributes:
        encode_s, decode_s: seconds for one pass over the held-out text, all of it in one batch.
        raw_encode_s: the same pass by the library underneath, called directly; None where there is none.
        ratio_to_raw: our encoding rate over the library's, turn by turn; below 1 is what our wrapping costs.
        peak_bytes: highest memory of a process that loaded text and tokenizer and encoded it once.
    """

    encode_s: Spread
    decode_s: Spread
    raw_encode_s: Spread | None
    ratio_to_raw: Spread | None
    peak_bytes: int


@dataclass(frozen=True)
class TokenizerFigures:
    """What one tokenizer came to on the held-out text.

    Attributes:
        name: a row of ``KINDS``, or the file of a tokenizer that was not fitted here.
        model_bytes: size of its file.
        fit_s, fit_peak_bytes: seconds to fit it, and the highest memory of a process that did; None for a file.
        n_bytes, n_chars, n_tokens: of the held-out text.
        lost: where the text that comes back from its ids first differs; None: lossless.
        same_ids_as_raw: whether the raw library gave the same ids, without which a ratio would compare different work.
    """

    name: str
    backend: str
    vocab_size: int
    model_bytes: int
    fit_s: Spread | None
    fit_peak_bytes: int | None
    n_bytes: int
    n_chars: int
    n_tokens: int
    lost: str | None
    same_ids_as_raw: bool | None
    one_thread: Speed
    all_threads: Speed

    @property
    def is_lossless(self) -> bool:
        """Whether every held-out passage came back from its ids as it was."""
        return self.lost is None

    @property
    def bytes_per_token(self) -> float:
        """Held-out bytes over held-out tokens: how much text a window of the model sees."""
        return self.n_bytes / self.n_tokens

    @property
    def tokens_per_char(self) -> float:
        """Held-out tokens over held-out characters."""
        return self.n_tokens / self.n_chars

    def mb_per_s(self, seconds: Spread) -> float:
        """Return the rate of a pass in millions of bytes of text per second, from its median time."""
        return self.n_bytes / seconds.median / 1e6

    def tokens_per_s(self, seconds: Spread) -> float:
        """Return the rate of a pass in tokens per second, from its median time."""
        return self.n_tokens / seconds.median

    def as_dict(self) -> dict[str, Any]:
        """Return figures and rates as plain data; rates without a number of threads are those of all threads."""
        plain = {
            **asdict(self),
            "is_lossless": self.is_lossless,
            "bytes_per_token": self.bytes_per_token,
            "tokens_per_char": self.tokens_per_char,
            "encode_s": self.all_threads.encode_s.as_dict(),
        }
        for name, speed in (("one_thread", self.one_thread), ("all_threads", self.all_threads)):
            rates = self._rates(speed)
            plain[name].update(rates)
            if name == "all_threads":
                plain.update(rates)
        return plain

    def _rates(self, speed: Speed) -> dict[str, float]:
        return {
            f"{kind}_{unit}": rate(seconds)
            for kind, seconds in (("encode", speed.encode_s), ("decode", speed.decode_s))
            for unit, rate in (("mb_per_s", self.mb_per_s), ("tokens_per_s", self.tokens_per_s))
        }


@dataclass(frozen=True)
class TokenizerReport:
    """The benchmark's outcome; ``unavailable`` names the backends that could not be imported, and why."""

    corpus_documents: int
    corpus_bytes: int
    corpus_sha256: str
    fitted_on_chars: int
    held_out: HeldOut
    vocab_size: int
    repeats: int
    seed: int
    unavailable: dict[str, str]
    tokenizers: list[TokenizerFigures]
    prep: list[PrepFigures]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        plain = {name: [figures.as_dict() for figures in getattr(self, name)] for name in ("tokenizers", "prep")}
        return {**asdict(self), **plain}


class Caller(Protocol):
    """Calls a method of a :class:`Bench`, here or in another process."""

    def call(self, method: str, *arguments: Any) -> Any: ...


Start = Callable[[bytes, Texts, int], Caller]


def bench_tokenizers(
    sources: Sequence[Source],
    *,
    held_out: Sequence[Source] = (),
    models: Sequence[Path] = (),
    vocab_size: int = 4096,
    corpus_repeat: int = 1,
    repeats: int = 3,
    seed: int = 1337,
    sample_chars: int = SAMPLE_CHARS,
    min_run_s: float = MIN_RUN_S,
    with_prep: bool = False,
    notice: Callable[[str], None] = lambda text: None,
    on_bytes: Callable[[int, int], None] | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> TokenizerReport:
    """Fit every kind that can be imported on ``sources`` and measure it, and ``models`` beside it, on other text.

    Args:
        held_out: the text to measure on; none given, about a tenth of ``sources``. Of either, an even sample.
        models: tokenizer files, measured with the library that they are made for.
        corpus_repeat: how many times each passage is repeated, after some were held out: both sides of the split are
            repeated, and neither gets text of the other. Fewer times, with a notice, where more than
            ``REPEATED_CHARS`` would come of it.
        sample_chars: characters of ``sources`` to fit on, at most, before they are repeated.
        min_run_s: what a run lasts at least; see :func:`measure_tokenizers`.
        with_prep: also prepare all of ``sources`` with each, as ``tokenization.prep.bench_prep`` does.
        repeats: counted runs of each, in turns. Fitting has no run to warm up: a person waits for the first.
        on_bytes: told the bytes of ``sources`` read so far and in all.

    Raises:
        ConfigError: ``repeats``, ``corpus_repeat`` or ``vocab_size`` is too small, two tokenizers have one name, or
            prep cannot read a source.
        CorpusError: a source cannot be read or holds too little text.
        TokenizerError: a file of ``models`` cannot be read.
        WorkerError: a process that measures ended early.
    """
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}; use 1 or more")
    if corpus_repeat < 1:
        raise ConfigError(f"a corpus repeated {corpus_repeat} times is empty; use 1 or more")
    check_fit("simple", vocab_size, None, sample_chars)
    preparable = check_preparable(sources) if with_prep else []
    loaded = load_named(models)
    report = ReadReport()
    documents = read_documents(sources, report, segment_bytes=SAMPLE_SEGMENT_BYTES, on_bytes=on_bytes)
    if held_out:
        fitted_on = sample_passages((d.text for d in documents), seed, budget=sample_chars, notice=notice)
        others = (document.text for document in read_documents(held_out, segment_bytes=SAMPLE_SEGMENT_BYTES))
        measured_on = sample_passages(others, seed, budget=HELD_OUT_CHARS)
    else:
        sampled = sample_corpus(
            documents, seed=seed, sample_chars=sample_chars, held_out_chars=HELD_OUT_CHARS, notice=notice
        )
        fitted_on, measured_on = sampled.fitted_on, sampled.held_out
    for line in report.lines():
        notice(line)
    repeat = _repetitions(corpus_repeat, fitted_on, measured_on, notice)
    described = _describe(measured_on, fitted_on, repeat)
    fitted_on, measured_on = fitted_on * repeat, measured_on * repeat
    unavailable = {name: why for name, why in available_backends().items() if why is not None}
    for name, why in unavailable.items():
        notice(f"left out: {name} cannot be imported ({why})")
    fits = fit_in_turns(
        [name for name, (backend, _) in KINDS.items() if backend not in unavailable],
        fitted_on,
        vocab_size=vocab_size,
        repeats=repeats,
        notice=notice,
        on_progress=on_progress,
    )
    fitted = {name: tokenizer_from_bytes(made[-1].content) for name, made in fits.items()}
    figures = measure_tokenizers(
        {**fitted, **loaded}, measured_on, fits=fits, repeats=repeats, min_run_s=min_run_s, on_progress=on_progress
    )
    prepared = []
    if with_prep:
        prepared = bench_prep({**fitted, **loaded}, preparable, repeats=repeats, on_progress=on_progress)
    return TokenizerReport(
        corpus_documents=report.documents,
        corpus_bytes=report.bytes,
        corpus_sha256=report.sha256,
        fitted_on_chars=sum(map(len, fitted_on)),
        held_out=described,
        vocab_size=vocab_size,
        repeats=repeats,
        seed=seed,
        unavailable=unavailable,
        tokenizers=figures,
        prep=prepared,
    )


def load_named(paths: Sequence[Path]) -> dict[str, Tokenizer]:
    """Return the tokenizers of ``paths`` under their paths. Raises ConfigError for a path that is given twice."""
    twice = sorted({str(path) for path in paths if paths.count(path) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)} is named twice; name each tokenizer file once")
    return {str(path): load_tokenizer(path) for path in paths}


class Fit:
    """Passages to fit on; made in a process of its own, which fits once and ends."""

    def __init__(self, passages: Texts) -> None:
        self._passages = passages

    def fit(self, kind: str, vocab_size: int) -> Fitted:
        """Fit a row of ``KINDS``."""
        backend, model_type = KINDS[kind]
        said: list[str] = []
        began = time.perf_counter()
        tokenizer = fit_passages(self._passages, backend, vocab_size, model_type=model_type, notice=said.append)
        return Fitted(time.perf_counter() - began, tokenizer.to_bytes(), peak_resident_bytes(), tuple(said))


def fit_in_turns(
    kinds: Sequence[str],
    passages: Texts,
    *,
    vocab_size: int,
    repeats: int,
    notice: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, list[Fitted]]:
    """Fit each of ``kinds`` ``repeats`` times, each time in a new process; return the fits by kind."""

    def candidate(kind: str) -> Callable[[Count], Fitted]:
        def fit(_: Count) -> Fitted:
            with IsolatedProcess(Fit, passages) as process:
                made: Fitted = process.call("fit", kind, vocab_size)
            return made

        return fit

    candidates = {f"fit {kind}": candidate(kind) for kind in kinds}
    fits = dict(
        zip(kinds, run_interleaved(candidates, repeats, warm_ups=0, on_progress=on_progress).values(), strict=True)
    )
    for kind, made in fits.items():
        for line in made[0].notices:
            notice(f"{kind}: {line}")
    return fits


class Bench:
    """One tokenizer and the text it is measured on, at one number of threads (0: all)."""

    def __init__(self, content: bytes, texts: Texts, threads: int, clock: Clock = time.perf_counter) -> None:
        self._tokenizer = tokenizer_from_bytes(content)
        self._texts, self._threads, self._clock = list(texts), threads, clock
        self._rows = self._encode()
        self._peak_bytes = peak_resident_bytes()
        self._raw = raw_encode(self._tokenizer, threads)

    def has_raw(self) -> bool:
        """Whether there is a library underneath."""
        return self._raw is not None

    def passes(self, work: str, at_least_s: float) -> int:
        """Return how many passes of ``encode``, ``decode`` or ``raw`` fill ``at_least_s``."""
        return passes_for(self._work(work), at_least_s, clock=self._clock)

    def seconds(self, work: str, passes: int) -> float:
        """Return the seconds that one of so many passes took."""
        call = self._work(work)
        began = self._clock()
        for _ in range(passes):
            call()
        return (self._clock() - began) / passes

    def facts(self) -> Facts:
        """Return what does not depend on the clock."""
        same = None if self._raw is None else self._raw(self._texts) == self._rows
        return Facts(sum(map(len, self._rows)), self._lost(), same, self._peak_bytes)

    def _work(self, work: str) -> Callable[[], object]:
        raw = self._raw
        if work == "raw" and raw is not None:
            return lambda: raw(self._texts)
        return {"encode": self._encode, "decode": self._decode}[work]

    def _encode(self) -> list[list[int]]:
        return self._tokenizer.encode_batch(self._texts, self._threads)

    def _decode(self) -> list[str]:
        return self._tokenizer.decode_batch(self._rows, self._threads)

    def _lost(self) -> str | None:
        """Return where the first text that does not come back differs from what does."""
        for text, back in zip(self._texts, self._decode(), strict=True):
            if text != back:
                at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), len(back))
                return repr(text[max(0, at - _EXCERPT_CHARS) : at + _EXCERPT_CHARS])
        return None


def start_apart(content: bytes, texts: Texts, threads: int) -> IsolatedProcess:
    """Return a :class:`Bench` in a process of its own."""
    return IsolatedProcess(Bench, content, texts, threads, environment=_ONE_THREAD if threads == 1 else _ALL_THREADS)


def measure_tokenizers(
    tokenizers: Mapping[str, Tokenizer],
    texts: Texts,
    *,
    fits: Mapping[str, Sequence[Fitted]],
    repeats: int,
    min_run_s: float = MIN_RUN_S,
    start: Start = start_apart,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> list[TokenizerFigures]:
    """Measure each tokenizer on ``texts``, on one thread and on all: ours, the raw library and decoding, in turns.

    A run makes passes over the text until ``min_run_s`` is filled, so on a small text the libraries' own caches of
    words are warm; ours and the raw call share that alike.
    """
    with ExitStack() as stack:
        callers: dict[tuple[str, int], Caller] = {}
        candidates: dict[str, Callable[[Count], float]] = {}
        for threads, words in ((1, "one thread"), (0, "all threads")):
            for name, tokenizer in tokenizers.items():
                caller = callers[name, threads] = start(tokenizer.to_bytes(), texts, threads)
                if isinstance(caller, IsolatedProcess):
                    stack.callback(caller.close)
                for work in ("encode", "raw", "decode") if caller.call("has_raw") else ("encode", "decode"):
                    candidates[f"{work} {name}, {words}"] = _timed(caller, work, caller.call("passes", work, min_run_s))
        runs = run_interleaved(candidates, repeats, on_progress=on_progress)
        facts: dict[tuple[str, int], Facts] = {key: caller.call("facts") for key, caller in callers.items()}

    def speed(name: str, threads: int, words: str) -> Speed:
        encode_s, raw_s = runs[f"encode {name}, {words}"], runs.get(f"raw {name}, {words}")
        return Speed(
            encode_s=Spread.of(encode_s),
            decode_s=Spread.of(runs[f"decode {name}, {words}"]),
            raw_encode_s=None if raw_s is None else Spread.of(raw_s),
            ratio_to_raw=None if raw_s is None else paired_ratio(raw_s, encode_s),
            peak_bytes=facts[name, threads].peak_bytes,
        )

    return [
        TokenizerFigures(
            name=name,
            backend=tokenizer.backend,
            vocab_size=tokenizer.vocab_size,
            model_bytes=len(tokenizer.to_bytes()),
            fit_s=Spread.of([made.seconds for made in fits[name]]) if name in fits else None,
            fit_peak_bytes=max(made.peak_bytes for made in fits[name]) if name in fits else None,
            n_bytes=sum(len(text.encode("utf-8")) for text in texts),
            n_chars=sum(map(len, texts)),
            n_tokens=facts[name, 0].n_tokens,
            lost=facts[name, 0].lost or facts[name, 1].lost,
            same_ids_as_raw=facts[name, 0].same_ids_as_raw,
            one_thread=speed(name, 1, "one thread"),
            all_threads=speed(name, 0, "all threads"),
        )
        for name, tokenizer in tokenizers.items()
    ]


def _timed(caller: Caller, work: str, passes: int) -> Callable[[Count], float]:
    def run(_: Count) -> float:
        seconds: float = caller.call("seconds", work, passes)
        return seconds

    return run


def _repetitions(asked: int, fitted_on: Texts, measured_on: Texts, notice: Callable[[str], None]) -> int:
    """Return how many times to repeat both sides: as often as asked, or as often as ``REPEATED_CHARS`` allows."""
    longer = max(sum(map(len, fitted_on)), sum(map(len, measured_on)), 1)
    repeat = min(asked, max(1, REPEATED_CHARS // longer))
    if repeat < asked:
        notice(
            f"the corpus is repeated {repeat:,} times instead of {asked:,}: repetition fills up to {REPEATED_CHARS:,} "
            "characters, and this corpus is large enough to be measured without more"
        )
    return repeat


def _describe(measured_on: Texts, fitted_on: Texts, repeat: int) -> HeldOut:
    digest = hashlib.sha256()
    for text in measured_on:
        digest.update(text.encode("utf-8"))
    overlap = shared_text((Document(text, "") for text in measured_on), (Document(text, "") for text in fitted_on))
    n_bytes = sum(len(text.encode("utf-8")) for text in measured_on)
    return HeldOut(len(measured_on) * repeat, n_bytes * repeat, digest.hexdigest(), overlap, repeat)

"""Tokenizer benchmark: training, speed, memory, compression and losslessness of the backends on held-out text.

Every training run, and every tokenizer at every number of threads, has a process of its own: so it has its own peak
memory, and Hugging Face's library reads its number of threads only once. The runs are interleaved, one at a time.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from psannlm.benchmarks.harness.interleaved import Clock, Count, paired_ratio, passes_for, run_interleaved
from psannlm.benchmarks.harness.isolated_process import IsolatedProcess
from psannlm.benchmarks.tokenization.prep import bench_prep, check_preparable
from psannlm.benchmarks.tokenization.raw_libraries import raw_encode
from psannlm.benchmarks.tokenization.report import Facts, Fitted
from psannlm.config.data import PathSource, Source
from psannlm.data.corpus.documents import Document, ReadReport, read_documents
from psannlm.data.prepare import shared_text
from psannlm.data.tokenizer_training import SAMPLE_SEGMENT_BYTES, sample_corpus
from psannlm.errors import ConfigError, PsannlmError
from psannlm.reports.schemas.measured import Spread
from psannlm.reports.schemas.tokenizers import HeldOut, Speed, TokenizerFigures, TokenizerReport
from psannlm.runtime.log import receiving_messages
from psannlm.runtime.progress import OnProgress, ignore_progress
from psannlm.runtime.resident_memory import peak_resident_bytes
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import (
    available_backends,
    check_fit,
    fit_passages,
    load_tokenizer,
    tokenizer_from_bytes,
)
from psannlm.tokenizers.sample import SAMPLE_CHARS, sample_passages

log = logging.getLogger(__name__)

# Name in the table: backend and model type.
KINDS: dict[str, tuple[str, str | None]] = {
    "sentencepiece unigram": ("sentencepiece", "unigram"),
    "sentencepiece bpe": ("sentencepiece", "bpe"),
    "byte-level bpe": ("tokenizers", None),
    "characters": ("simple", None),
}
# Enough text for a steady throughput, little enough to be held by every process.
HELD_OUT_CHARS = 4_000_000
# Size up to which a small corpus is repeated: SentencePiece trains on it in ten seconds, and throughput is steady.
REPEATED_CHARS = 1_000_000
# One pass over a small text takes a millisecond or two: a run makes enough passes to last this long.
MIN_RUN_S = 0.1
_EXCERPT_CHARS = 20
# The libraries read their number of threads from these variables when they are loaded.
_ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
_ALL_THREADS = {"TOKENIZERS_PARALLELISM": "true"}

Texts = Sequence[str]


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
    engine: str = "local",
    on_progress: OnProgress = ignore_progress,
) -> TokenizerReport:
    """Train every available backend on ``sources`` and measure it, and the ``models``, on held-out text.

    Args:
        held_out: the text to measure on; if empty, about 10% of ``sources``. Of either, an even sample.
        models: tokenizer files, measured with the library that they belong to.
        corpus_repeat: number of copies of each passage, made after the split: both splits are repeated, and neither
            gets text of the other. If that would exceed ``REPEATED_CHARS``, fewer copies are made.
        sample_chars: maximum number of characters of ``sources`` to train on, before they are repeated.
        min_run_s: minimum duration of a run; see :func:`measure_tokenizers`.
        with_prep: also prepare all of ``sources`` with each tokenizer, see ``tokenization.prep.bench_prep``.
        engine: ``ray`` prepares them on a Ray cluster of this machine too.
        repeats: counted runs of each, interleaved. Training has no warm-up run: a user waits for the first one.
        on_progress: gets the bytes of ``sources`` read so far, then the runs.

    Raises:
        ConfigError: ``repeats``, ``corpus_repeat`` or ``vocab_size`` is too small, two tokenizers have one name, or
            prep cannot read a source.
        CorpusError: a source cannot be read or holds too little text.
        TokenizerError: a file of ``models`` cannot be read.
        WorkerError: a measuring process ended early.
    """
    for name, value in (("repeats", repeats), ("corpus_repeat", corpus_repeat)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; use 1 or more")
    check_fit("simple", vocab_size, None, sample_chars)
    preparable = check_preparable(sources) if with_prep else []
    loaded = load_named(models)
    report = ReadReport()
    documents = read_documents(sources, report, segment_bytes=SAMPLE_SEGMENT_BYTES, on_progress=on_progress)
    fitted_on, measured_on = _split(documents, held_out, seed, sample_chars)
    for line in report.lines():
        log.info(line)
    repeat = _repetitions(corpus_repeat, fitted_on, measured_on)
    described = _describe(measured_on, fitted_on, repeat)
    fitted_on, measured_on = fitted_on * repeat, measured_on * repeat
    unavailable = _unavailable_backends()
    fits = fit_interleaved(
        [name for name, (backend, _) in KINDS.items() if backend not in unavailable],
        fitted_on,
        vocab_size=vocab_size,
        repeats=repeats,
        on_progress=on_progress,
    )
    fitted = {name: tokenizer_from_bytes(made[-1].content) for name, made in fits.items()}
    figures = measure_tokenizers(
        {**fitted, **loaded}, measured_on, fits=fits, repeats=repeats, min_run_s=min_run_s, on_progress=on_progress
    )
    prepared = []
    if with_prep:
        prepared = bench_prep({**fitted, **loaded}, preparable, repeats=repeats, engine=engine, on_progress=on_progress)
    return TokenizerReport(
        corpus=[source.path if isinstance(source, PathSource) else source.builtin for source in sources],
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


def _unavailable_backends() -> dict[str, str]:
    """Return the backends that cannot be imported, with the reasons."""
    unavailable = {name: why for name, why in available_backends().items() if why is not None}
    for name, why in unavailable.items():
        log.warning(f"left out: {name} cannot be imported ({why})")
    return unavailable


def _split(
    documents: Iterable[Document],
    held_out: Sequence[Source],
    seed: int,
    sample_chars: int,
) -> tuple[list[str], list[str]]:
    """Return the passages to train on and those to measure on: of ``held_out``, or about 10% of ``documents``."""
    if not held_out:
        sampled = sample_corpus(documents, seed=seed, sample_chars=sample_chars, held_out_chars=HELD_OUT_CHARS)
        return sampled.fitted_on, sampled.held_out
    fitted_on = sample_passages((document.text for document in documents), seed, budget=sample_chars)
    others = (document.text for document in read_documents(held_out, segment_bytes=SAMPLE_SEGMENT_BYTES))
    return fitted_on, sample_passages(others, seed, budget=HELD_OUT_CHARS, use="the tokenizers are measured on")


def load_named(paths: Sequence[Path]) -> dict[str, Tokenizer]:
    """Load the tokenizers of ``paths``, keyed by path. Raises ConfigError for a path that is given twice."""
    twice = sorted({str(path) for path in paths if paths.count(path) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)} is named twice; name each tokenizer file once")
    return {str(path): load_tokenizer(path) for path in paths}


class Fit:
    """Passages to train a tokenizer on, in a process of its own, which trains once and ends."""

    def __init__(self, passages: Texts) -> None:
        self._passages = passages

    def fit(self, kind: str, vocab_size: int) -> Fitted:
        """Train the tokenizer ``kind`` of ``KINDS``."""
        backend, model_type = KINDS[kind]
        notices: list[str] = []
        began = time.perf_counter()
        with receiving_messages(notices.append):
            tokenizer = fit_passages(self._passages, backend, vocab_size, model_type=model_type)
        return Fitted(time.perf_counter() - began, tokenizer.to_bytes(), _peak_bytes(), tuple(notices))


def fit_interleaved(
    kinds: Sequence[str],
    passages: Texts,
    *,
    vocab_size: int,
    repeats: int,
    on_progress: OnProgress = ignore_progress,
) -> dict[str, list[Fitted]]:
    """Train each of ``kinds`` ``repeats`` times, each time in a new process; return the results by kind."""

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
            log.info(f"{kind}: {line}")
    return fits


def _peak_bytes() -> int:
    """Return the peak memory of this process. Raises PsannlmError where the system does not report it."""
    if (peak := peak_resident_bytes()) is None:
        raise PsannlmError("this system does not report the memory of a process, which bench-tokenizers measures")
    return peak


class Bench:
    """A tokenizer and the text that it is measured on, at one number of threads (0: all)."""

    def __init__(self, content: bytes, texts: Texts, threads: int, clock: Clock = time.perf_counter) -> None:
        self._tokenizer = tokenizer_from_bytes(content)
        self._texts, self._threads, self._clock = list(texts), threads, clock
        self._rows = self._encode()
        self._peak_bytes = _peak_bytes()
        self._raw = raw_encode(self._tokenizer, threads)

    def has_raw(self) -> bool:
        """Whether the tokenizer wraps another library."""
        return self._raw is not None

    def passes(self, work: str, at_least_s: float) -> int:
        """Return how many passes of ``encode``, ``decode`` or ``raw`` fill ``at_least_s``."""
        return passes_for(self._work(work), at_least_s, clock=self._clock)

    def seconds(self, work: str, passes: int) -> float:
        """Return the mean seconds of one of ``passes`` passes."""
        call = self._work(work)
        began = self._clock()
        for _ in range(passes):
            call()
        return (self._clock() - began) / passes

    def facts(self) -> Facts:
        """Return the results that do not depend on the clock."""
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
        """Return an excerpt of the first text that is not recovered from its ids, or None."""
        for text, back in zip(self._texts, self._decode(), strict=True):
            if text != back:
                at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), len(back))
                return repr(text[max(0, at - _EXCERPT_CHARS) : at + _EXCERPT_CHARS])
        return None


def start_isolated(content: bytes, texts: Texts, threads: int) -> IsolatedProcess:
    """Return a :class:`Bench` in a process of its own."""
    return IsolatedProcess(Bench, content, texts, threads, environment=_ONE_THREAD if threads == 1 else _ALL_THREADS)


def measure_tokenizers(
    tokenizers: Mapping[str, Tokenizer],
    texts: Texts,
    *,
    fits: Mapping[str, Sequence[Fitted]],
    repeats: int,
    min_run_s: float = MIN_RUN_S,
    start: Start = start_isolated,
    on_progress: OnProgress = ignore_progress,
) -> list[TokenizerFigures]:
    """Time encoding, decoding and the raw library's encoding of each tokenizer, on one thread and on all, interleaved.

    A run makes passes over the text for at least ``min_run_s``. On a small text the libraries' word caches are warm
    then, for our call and the raw call alike.
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


def _repetitions(asked: int, fitted_on: Texts, measured_on: Texts) -> int:
    """Return the number of copies of both splits: as requested, or as many as ``REPEATED_CHARS`` allows."""
    longer = max(sum(map(len, fitted_on)), sum(map(len, measured_on)), 1)
    repeat = min(asked, max(1, REPEATED_CHARS // longer))
    if repeat < asked:
        log.warning(
            f"the corpus is repeated {repeat:,} times instead of {asked:,}: repetition stops at {REPEATED_CHARS:,} "
            "characters, which are enough to measure"
        )
    return repeat


def _describe(measured_on: Texts, fitted_on: Texts, repeat: int) -> HeldOut:
    digest = hashlib.sha256()
    for text in measured_on:
        digest.update(text.encode("utf-8"))
    overlap = shared_text((Document(text, "") for text in measured_on), (Document(text, "") for text in fitted_on))
    n_bytes = sum(len(text.encode("utf-8")) for text in measured_on)
    return HeldOut(len(measured_on) * repeat, n_bytes * repeat, digest.hexdigest(), overlap, repeat)

"""A corpus in; for each tokenizer backend side by side how fast, how dense and how true it is on held-out text, out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from psannlm.benchmarks.timing import Clock, Count, Spread, Standing, paired_ratio, passes_for, take_turns, timed
from psannlm.config.data import Source
from psannlm.data.documents import Document, ReadReport, read_documents
from psannlm.data.prepare import shared_text, split_documents
from psannlm.errors import ConfigError
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import available_backends, fit_tokenizer, load_tokenizer

_HELD_OUT = 0.1
# Of a small text one pass takes a millisecond or two: a run makes as many as fill this time.
MIN_RUN_S = 0.1

Texts = Sequence[str]


@dataclass(frozen=True)
class HeldOut:
    """The text that everything but fitting is measured on. ``overlap``: the share of it that the fit saw too."""

    documents: int
    bytes: int
    sha256: str
    overlap: float


@dataclass(frozen=True)
class TokenizerFigures:
    """What one tokenizer came to on the held-out text.

    Attributes:
        name: the backend, or the file of a tokenizer that was not fitted here.
        model_bytes: size of its file.
        fit_s: seconds to fit it; None for a file.
        encode_s, decode_s: seconds for one pass over the held-out text, all of it in one batch.
        n_bytes, n_tokens: of the held-out text.
        lost: the first document that does not come back from its ids as it was; None: lossless.
        raw_encode_s: the same pass by the library underneath, called directly; None where there is none.
        ratio_to_raw: our encoding rate over the library's, turn by turn; below 1 is what our wrapping costs.
        same_ids_as_raw: whether both gave the same ids, without which the ratio would compare different work.
    """

    name: str
    backend: str
    vocab_size: int
    model_bytes: int
    fit_s: Spread | None
    encode_s: Spread
    decode_s: Spread
    n_bytes: int
    n_tokens: int
    lost: str | None
    raw_encode_s: Spread | None
    ratio_to_raw: Spread | None
    same_ids_as_raw: bool | None

    @property
    def is_lossless(self) -> bool:
        """Whether every held-out document came back from its ids as it was."""
        return self.lost is None

    @property
    def bytes_per_token(self) -> float:
        """Held-out bytes over held-out tokens: how much text a window of the model sees."""
        return self.n_bytes / self.n_tokens

    def mb_per_s(self, seconds: Spread) -> float:
        """Return the rate of a pass in millions of bytes of text per second, from its median time."""
        return self.n_bytes / seconds.median / 1e6

    def tokens_per_s(self, seconds: Spread) -> float:
        """Return the rate of a pass in tokens per second, from its median time."""
        return self.n_tokens / seconds.median

    def as_dict(self) -> dict[str, Any]:
        """Return figures and rates as plain data."""
        rates = {
            f"{kind}_{unit}": rate(seconds)
            for kind, seconds in (("encode", self.encode_s), ("decode", self.decode_s))
            for unit, rate in (("mb_per_s", self.mb_per_s), ("tokens_per_s", self.tokens_per_s))
        }
        return {**asdict(self), "is_lossless": self.is_lossless, "bytes_per_token": self.bytes_per_token, **rates}


@dataclass(frozen=True)
class TokenizerReport:
    """The benchmark's outcome; ``unavailable`` names the backends that could not be imported, and why."""

    corpus_documents: int
    corpus_bytes: int
    corpus_sha256: str
    held_out: HeldOut
    vocab_size: int
    repeats: int
    seed: int
    unavailable: dict[str, str]
    tokenizers: list[TokenizerFigures]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**asdict(self), "tokenizers": [figures.as_dict() for figures in self.tokenizers]}


def bench_tokenizers(
    sources: Sequence[Source],
    *,
    held_out: Sequence[Source] = (),
    models: Sequence[Path] = (),
    vocab_size: int = 4096,
    repeats: int = 3,
    seed: int = 1337,
    min_run_s: float = MIN_RUN_S,
    clock: Clock = time.perf_counter,
    notice: Callable[[str], None] = lambda text: None,
    on_standing: Callable[[Standing], None] = lambda standing: None,
) -> TokenizerReport:
    """Fit every backend that can be imported on ``sources`` and measure it, and ``models`` beside it, on other text.

    Args:
        held_out: the text to measure on; none given, a tenth of the documents of ``sources`` (the end of a single one).
        models: tokenizer files, measured with the library that they are made for.
        min_run_s: what a run lasts at least; see :func:`measure_tokenizers`.
        repeats: counted runs of each, in turns. Fitting has no run to warm up: a person waits for the first.

    Raises:
        ConfigError: ``repeats`` or ``vocab_size`` is too small, or two tokenizers have one name.
        CorpusError: a source cannot be read or holds too little text.
        TokenizerError: a file of ``models`` cannot be read.
    """
    report = ReadReport()
    documents = list(read_documents(sources, report))
    if held_out:
        fitted_on, measured_on = documents, list(read_documents(held_out))
    else:
        fitted_on, measured_on = split_documents(documents, _HELD_OUT, seed)
    for line in report.lines():
        notice(line)
    loaded = load_named(models)
    backends = available_backends()
    unavailable = {name: why for name, why in backends.items() if why is not None}
    for name, why in unavailable.items():
        notice(f"left out: {name} cannot be imported ({why})")
    texts = [document.text for document in fitted_on]
    fitted, fit_s = fit_in_turns(
        [name for name, why in backends.items() if why is None],
        texts,
        vocab_size=vocab_size,
        repeats=repeats,
        seed=seed,
        clock=clock,
        notice=notice,
        on_standing=on_standing,
    )
    figures = measure_tokenizers(
        {**fitted, **loaded},
        measured_on,
        fit_s=fit_s,
        repeats=repeats,
        min_run_s=min_run_s,
        clock=clock,
        on_standing=on_standing,
    )
    return TokenizerReport(
        corpus_documents=report.documents,
        corpus_bytes=report.bytes,
        corpus_sha256=report.sha256,
        held_out=_describe(measured_on, fitted_on),
        vocab_size=vocab_size,
        repeats=repeats,
        seed=seed,
        unavailable=unavailable,
        tokenizers=figures,
    )


def load_named(paths: Sequence[Path]) -> dict[str, Tokenizer]:
    """Return the tokenizers of ``paths`` under their paths. Raises ConfigError for a path that is given twice."""
    twice = sorted({str(path) for path in paths if paths.count(path) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)} is named twice; name each tokenizer file once")
    return {str(path): load_tokenizer(path) for path in paths}


def fit_in_turns(
    backends: Sequence[str],
    texts: Texts,
    *,
    vocab_size: int,
    repeats: int,
    seed: int = 1337,
    clock: Clock = time.perf_counter,
    notice: Callable[[str], None] = lambda text: None,
    on_standing: Callable[[Standing], None] = lambda standing: None,
) -> tuple[dict[str, Tokenizer], dict[str, Spread]]:
    """Fit each backend ``repeats`` times; return the tokenizers and the seconds that fitting took, both by backend."""
    said: set[str] = set()

    def say_once(text: str) -> None:
        if text not in said:
            said.add(text)
            notice(text)

    def candidate(backend: str) -> Callable[[Count], tuple[float, Tokenizer]]:
        def fit(_: Count) -> tuple[float, Tokenizer]:
            began = clock()
            tokenizer = fit_tokenizer(
                texts, backend, vocab_size, seed=seed, notice=lambda text: say_once(f"{backend}: {text}")
            )
            return clock() - began, tokenizer

        return fit

    candidates = {f"fit {backend}": candidate(backend) for backend in backends}
    results = take_turns(candidates, repeats, warm_ups=0, clock=clock, on_standing=on_standing)
    runs = dict(zip(backends, results.values(), strict=True))
    fitted = {backend: made[-1][1] for backend, made in runs.items()}
    return fitted, {backend: Spread.of([seconds for seconds, _ in made]) for backend, made in runs.items()}


def measure_tokenizers(
    tokenizers: Mapping[str, Tokenizer],
    documents: Sequence[Document],
    *,
    fit_s: Mapping[str, Spread],
    repeats: int,
    min_run_s: float = MIN_RUN_S,
    clock: Clock = time.perf_counter,
    on_standing: Callable[[Standing], None] = lambda standing: None,
) -> list[TokenizerFigures]:
    """Measure each tokenizer on ``documents``: encoding beside the raw library's and decoding, all in turns.

    A run makes passes over the text until ``min_run_s`` is filled, so on a small text the libraries' own caches of
    words are warm; ours and the raw call share that alike.
    """
    texts = [document.text for document in documents]
    encoded = {name: tokenizer.encode_batch(texts) for name, tokenizer in tokenizers.items()}
    raw = {name: call for name, tokenizer in tokenizers.items() if (call := raw_encode(tokenizer)) is not None}
    work: dict[str, Callable[[], object]] = {}
    for name, tokenizer in tokenizers.items():
        work[f"encode {name}"] = partial(tokenizer.encode_batch, texts)
        if name in raw:
            work[f"encode {name}, raw"] = partial(raw[name], texts)
        work[f"decode {name}"] = partial(_decode_all, tokenizer, encoded[name])
    candidates = {
        name: timed(call, passes_for(call, min_run_s, clock=clock), clock=clock) for name, call in work.items()
    }
    runs = take_turns(candidates, repeats, clock=clock, on_standing=on_standing)

    figures = []
    for name, tokenizer in tokenizers.items():
        encode_s, raw_s = runs[f"encode {name}"], runs.get(f"encode {name}, raw")
        figures.append(
            TokenizerFigures(
                name=name,
                backend=tokenizer.backend,
                vocab_size=tokenizer.vocab_size,
                model_bytes=len(tokenizer.to_bytes()),
                fit_s=fit_s.get(name),
                encode_s=Spread.of(encode_s),
                decode_s=Spread.of(runs[f"decode {name}"]),
                n_bytes=sum(document.n_bytes for document in documents),
                n_tokens=sum(map(len, encoded[name])),
                lost=_first_lost(tokenizer, documents, encoded[name]),
                raw_encode_s=None if raw_s is None else Spread.of(raw_s),
                ratio_to_raw=None if raw_s is None else paired_ratio(raw_s, encode_s),
                same_ids_as_raw=raw[name](texts) == encoded[name] if name in raw else None,
            )
        )
    return figures


def raw_encode(tokenizer: Tokenizer) -> Callable[[Texts], list[list[int]]] | None:
    """Return the batch encoding of the library under ``tokenizer``, called directly on the same model; None for ours.

    Both ways end in lists of ids, as SentencePiece gives them and as any user of Hugging Face's encodings takes them.
    """
    if tokenizer.backend == "sentencepiece":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.to_bytes())
        return lambda texts: processor.encode(list(texts))
    if tokenizer.backend == "tokenizers":
        import tokenizers

        model = tokenizers.Tokenizer.from_str(tokenizer.to_bytes().decode("utf-8"))
        return lambda texts: [row.ids for row in model.encode_batch_fast(texts, add_special_tokens=False)]
    return None


def _decode_all(tokenizer: Tokenizer, rows: Sequence[Sequence[int]]) -> list[str]:
    return [tokenizer.decode(ids) for ids in rows]


def _first_lost(tokenizer: Tokenizer, documents: Sequence[Document], encoded: Sequence[Sequence[int]]) -> str | None:
    """Return the name of the first document that its ids do not give back."""
    for document, ids in zip(documents, encoded, strict=True):
        if tokenizer.decode(ids) != document.text:
            return document.name
    return None


def _describe(measured_on: Sequence[Document], fitted_on: Sequence[Document]) -> HeldOut:
    report = ReadReport()
    for document in measured_on:
        report.add(document)
    return HeldOut(report.documents, report.bytes, report.sha256, shared_text(measured_on, fitted_on))

"""Schema of a tokenizer benchmark (``reports/tokenizers/<ts>/metrics.json``)."""

from __future__ import annotations

from typing import Any

from pydantic import SerializerFunctionWrapHandler, computed_field, model_serializer
from pydantic.dataclasses import dataclass

from psannlm.io.artifact_schema import Figure, Figures, Flag, Whole
from psannlm.reports.schemas.measured import Spread


@dataclass(frozen=True)
class HeldOut(Figures):
    """The text that the tokenizers are measured on.

    Attributes:
        passages, bytes: with all copies.
        sha256: of the text without copies.
        overlap: fraction of the text that is in the training text too.
        repeat: number of copies.
    """

    passages: Whole
    bytes: Whole
    sha256: str
    overlap: Figure
    repeat: Whole = 1


@dataclass(frozen=True, kw_only=True)
class Speed(Figures):
    """Speed of a tokenizer at one number of threads.

    Attributes:
        encode_s, decode_s: seconds of one pass over the held-out text, in one batch.
        raw_encode_s: the same pass by the raw library, called directly; None if there is none.
        ratio_to_raw: our encoding throughput over the raw library's, run by run; below 1, our wrapper costs time.
        peak_bytes: peak memory of a process that loaded text and tokenizer and encoded the text once.
    """

    encode_s: Spread
    decode_s: Spread
    raw_encode_s: Spread | None
    ratio_to_raw: Spread | None
    peak_bytes: Whole


@dataclass(frozen=True, kw_only=True)
class TokenizerFigures(Figures):
    """Results of one tokenizer on the held-out text.

    Attributes:
        name: a key of ``KINDS``, or the file of a tokenizer that was not trained here.
        model_bytes: size of the tokenizer file.
        fit_s, fit_peak_bytes: seconds of training and peak memory of its process; None for a file.
        n_bytes, n_chars, n_tokens: size of the held-out text; ``n_chars`` is None in files of early versions.
        lost: excerpt of the first text that is not recovered from its ids; None: lossless.
        same_ids_as_raw: whether the raw library gave the same ids; otherwise ``ratio_to_raw`` compares different work.
    """

    name: str
    backend: str
    vocab_size: Whole
    model_bytes: Whole
    fit_s: Spread | None
    fit_peak_bytes: Whole | None
    n_bytes: Whole
    n_chars: Whole | None = None
    n_tokens: Whole
    lost: str | None
    same_ids_as_raw: Flag | None
    one_thread: Speed
    all_threads: Speed

    @computed_field  # type: ignore[prop-decorator]
    @property
    def is_lossless(self) -> bool:
        """Whether every held-out passage is recovered from its ids."""
        return self.lost is None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def bytes_per_token(self) -> float:
        """Held-out bytes over held-out tokens."""
        return self.n_bytes / self.n_tokens

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tokens_per_char(self) -> float | None:
        """Held-out tokens over held-out characters."""
        return self.n_tokens / self.n_chars if self.n_chars else None

    def mb_per_s(self, seconds: Spread) -> float:
        """Return the throughput of a pass in millions of bytes of text per second, from its median time."""
        return self.n_bytes / seconds.median / 1e6

    def tokens_per_s(self, seconds: Spread) -> float:
        """Return the throughput of a pass in tokens per second, from its median time."""
        return self.n_tokens / seconds.median

    @model_serializer(mode="wrap")
    def _with_throughputs(self, plain_fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Add the throughputs to both speeds, and repeat those with all threads outside."""
        plain: dict[str, Any] = plain_fields(self)
        plain["one_thread"].update(self._throughputs(self.one_thread))
        rates = self._throughputs(self.all_threads)
        plain["all_threads"].update(rates)
        return {**plain, "encode_s": plain["all_threads"]["encode_s"], **rates}

    def _throughputs(self, speed: Speed) -> dict[str, float]:
        return {
            f"{kind}_{unit}": rate(seconds)
            for kind, seconds in (("encode", speed.encode_s), ("decode", speed.decode_s))
            for unit, rate in (("mb_per_s", self.mb_per_s), ("tokens_per_s", self.tokens_per_s))
        }


@dataclass(frozen=True, kw_only=True)
class RayFigures(Figures):
    """Results of preparing the same corpus on a Ray cluster of one machine, with as many cores.

    Attributes:
        prep_s: seconds of the command, starting and ending the cluster included.
        prep_cpu_s: CPU seconds of all processes, Ray's own included, sampled; None without Linux's ``/proc``.
        start_s: seconds that the engine adds to the command on a corpus of one line.
        ratio_to_local: throughput with Ray over that with local processes, run by run.
    """

    prep_s: Spread
    prep_cpu_s: Spread | None
    peak_bytes: Whole | None
    start_s: Spread
    ratio_to_local: Spread


@dataclass(frozen=True, kw_only=True)
class PrepFigures(Figures):
    """Results of preparing a corpus with one tokenizer.

    Attributes:
        ray: the same with ``--engine ray``; None if it was not measured.
        n_bytes: UTF-8 bytes of all texts.
        raw_s, raw_arrays_s: seconds of the raw library, with lists of ids as results, and with arrays (SentencePiece;
            None for other libraries).
        ratio_to_raw, ratio_to_raw_arrays: prep's throughput over the raw library's, run by run.
        extra_tokens: ids of prep beyond those of the library, because long documents are encoded in segments.
    """

    name: str
    workers: Whole
    n_bytes: Whole
    n_tokens: Whole
    extra_tokens: Whole
    prep_s: Spread
    prep_cpu_s: Spread
    peak_bytes: Whole | None
    raw_s: Spread
    raw_cpu_s: Spread
    ratio_to_raw: Spread
    raw_arrays_s: Spread | None
    raw_arrays_cpu_s: Spread | None
    ratio_to_raw_arrays: Spread | None
    ray: RayFigures | None = None

    def mb_per_s(self, seconds: Spread) -> float:
        """Return the throughput in millions of bytes of text per second, from a median time."""
        return self.n_bytes / seconds.median / 1e6

    @computed_field  # type: ignore[prop-decorator]
    @property
    def prep_mb_per_s(self) -> float:
        """Throughput of prep."""
        return self.mb_per_s(self.prep_s)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def raw_mb_per_s(self) -> float:
        """Throughput of the raw library with lists of ids."""
        return self.mb_per_s(self.raw_s)


@dataclass(frozen=True, kw_only=True)
class TokenizerReport(Figures):
    """The whole file; ``unavailable`` maps backends that could not be imported to the reason."""

    corpus: list[str]
    corpus_documents: Whole
    corpus_bytes: Whole
    corpus_sha256: str
    fitted_on_chars: Whole
    held_out: HeldOut
    vocab_size: Whole
    repeats: Whole
    seed: Whole
    unavailable: dict[str, str]
    tokenizers: list[TokenizerFigures]
    prep: list[PrepFigures]

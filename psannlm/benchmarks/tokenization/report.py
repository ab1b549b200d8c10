"""Results of the tokenizer benchmark: speed, memory, compression and losslessness, and their plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psannlm.benchmarks.harness.interleaved import Spread
from psannlm.benchmarks.tokenization.prep import PrepFigures
from psannlm.io.atomic import write_bytes
from psannlm.io.figures import render_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ONE, _ALL, _DENSITY = "#9ecae1", "#1f77b4", "#d95f02"
_BAR = 0.38
_NAME_CHARS = 24


@dataclass(frozen=True)
class HeldOut:
    """The text that the tokenizers are measured on.

    Attributes:
        passages, bytes: with all copies.
        sha256: of the text without copies.
        overlap: fraction of the text that is in the training text too.
        repeat: number of copies.
    """

    passages: int
    bytes: int
    sha256: str
    overlap: float
    repeat: int = 1


@dataclass(frozen=True)
class Fitted:
    """A trained tokenizer: seconds, file content, peak memory of its process, and notices."""

    seconds: float
    content: bytes
    peak_bytes: int
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Results that do not depend on the clock: ids, the first lost text, whether the raw library gives the same ids."""

    n_tokens: int
    lost: str | None
    same_ids_as_raw: bool | None
    peak_bytes: int


@dataclass(frozen=True)
class Speed:
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
    peak_bytes: int


@dataclass(frozen=True)
class TokenizerFigures:
    """Results of one tokenizer on the held-out text.

    Attributes:
        name: a key of ``KINDS``, or the file of a tokenizer that was not trained here.
        model_bytes: size of the tokenizer file.
        fit_s, fit_peak_bytes: seconds of training and peak memory of its process; None for a file.
        n_bytes, n_chars, n_tokens: size of the held-out text.
        lost: excerpt of the first text that is not recovered from its ids; None: lossless.
        same_ids_as_raw: whether the raw library gave the same ids; otherwise ``ratio_to_raw`` compares different work.
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
        """Whether every held-out passage is recovered from its ids."""
        return self.lost is None

    @property
    def bytes_per_token(self) -> float:
        """Held-out bytes over held-out tokens."""
        return self.n_bytes / self.n_tokens

    @property
    def tokens_per_char(self) -> float:
        """Held-out tokens over held-out characters."""
        return self.n_tokens / self.n_chars

    def mb_per_s(self, seconds: Spread) -> float:
        """Return the throughput of a pass in millions of bytes of text per second, from its median time."""
        return self.n_bytes / seconds.median / 1e6

    def tokens_per_s(self, seconds: Spread) -> float:
        """Return the throughput of a pass in tokens per second, from its median time."""
        return self.n_tokens / seconds.median

    def as_dict(self) -> dict[str, Any]:
        """Return figures and throughputs as plain data; those without a number of threads are of all threads."""
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
    """Results of the benchmark; ``unavailable`` maps backends that could not be imported to the reason."""

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


def draw_tokenizers(path: Path, title: str, rows: Sequence[TokenizerFigures]) -> None:
    """Plot encoding and decoding throughput, on one thread and on all, and bytes per token, by tokenizer.

    Raises:
        PictureError: the picture cannot be drawn.
        StorageError: the picture cannot be written.
    """
    write_bytes(path, render_figure(lambda: _tokenizers_figure(title, rows)))


def _tokenizers_figure(title: str, rows: Sequence[TokenizerFigures]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.9 + 0.62 * len(rows)), layout="constrained")
    encode, decode, density = figure.subplots(1, 3, sharey=True)
    places = range(len(rows))
    for axes, work in ((encode, "encode"), (decode, "decode")):
        for shift, colour, threads in ((-_BAR / 2, _ONE, "one thread"), (_BAR / 2, _ALL, "all threads")):
            rates = [_rate(row, work, threads) for row in rows]
            bars = axes.barh([place + shift for place in places], rates, _BAR, color=colour, label=threads)
            axes.bar_label(bars, [f"{rate:.3g}" for rate in rates], padding=3, fontsize=9)
        axes.set_xlabel(f"{work} (MB/s)")
    bars = density.barh(places, [row.bytes_per_token for row in rows], 2 * _BAR, color=_DENSITY)
    density.bar_label(bars, [f"{row.bytes_per_token:.2f}" for row in rows], padding=3, fontsize=9)
    density.set_xlabel("bytes per token on held-out text")
    encode.set_yticks(places, [_short(row.name) for row in rows])
    encode.invert_yaxis()
    for axes in (encode, decode, density):
        axes.margins(x=0.16)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*encode.get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False)
    figure.suptitle(title)
    return figure


def _rate(row: TokenizerFigures, work: str, threads: str) -> float:
    speed = row.one_thread if threads == "one thread" else row.all_threads
    return row.mb_per_s(speed.encode_s if work == "encode" else speed.decode_s)


def _short(name: str) -> str:
    """Return the end of a long name, since paths differ at their end."""
    return name if len(name) <= _NAME_CHARS else "…" + name[1 - _NAME_CHARS :]

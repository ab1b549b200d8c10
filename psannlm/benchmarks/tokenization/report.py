"""Results of the tokenizer benchmark: speed, memory, compression and losslessness, and their plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from psannlm.io.atomic import write_bytes
from psannlm.io.figures import render_figure
from psannlm.reports.schemas.tokenizers import TokenizerFigures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ONE, _ALL, _DENSITY = "#9ecae1", "#1f77b4", "#d95f02"
_BAR = 0.38
_NAME_CHARS = 24


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

"""Document model of a report page: headline figures, sections, tables and plots, and how values are formatted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from psannlm.display import shortened
from psannlm.io.readers import is_spread, number
from psannlm.tokenizers.roundtrip import LOSSY

_LONGEST_CELL, _LONGEST_COMMAND = 500, 1000


@dataclass(frozen=True)
class Origin:
    """Provenance of figures: command, machine, commit and folder."""

    command: str = ""
    machine: str = ""
    commit: str = ""
    folder: str = ""

    @classmethod
    def of(cls, system: dict[str, Any], folder: str = "") -> Origin:
        """Read the origin from a ``system.json``; what it does not hold stays empty."""
        command = shortened(_text(system.get("command")), _LONGEST_COMMAND)
        return cls(command, shortened(describe_machine(system)), _text(system.get("commit"))[:12], folder)


@dataclass(frozen=True)
class Headline:
    """A figure at the top of the page: value, unit, label and details."""

    value: str
    unit: str
    label: str
    of: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under headings; ``numbers`` holds the indices of the numeric columns.

    ``is_folded`` collapses it on the page.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()
    note: str = ""
    origin: Origin | None = None
    is_folded: bool = False

    def __post_init__(self) -> None:
        """Refuse cells that are not text, which figures of a damaged file may be.

        Raises:
            TypeError: a cell, a heading, the title or the note is not text.
        """
        for text in (self.title, self.note, *self.headings, *(cell for row in self.rows for cell in row)):
            if not isinstance(text, str):
                raise TypeError(f"{type(text).__name__} where text is expected")


@dataclass(frozen=True)
class Printed:
    """Output of a command, shown as it was printed."""

    title: str
    text: str


@dataclass(frozen=True)
class Picture:
    """An image as bytes, in several forms: ``png`` for Markdown, the others for the page.

    ``forms`` maps ``(is_narrow, is_dark)`` to SVG. The page shows ``png`` where there are none.
    """

    file: str
    alternative: str
    caption: str
    png: bytes
    forms: dict[tuple[bool, bool], bytes] = field(default_factory=dict)


Block = Table | Printed | Picture | str


@dataclass(frozen=True)
class Section:
    """A part of the page under one heading."""

    title: str
    blocks: Sequence[Block]
    origin: Origin | None = None


@dataclass(frozen=True)
class Document:
    """A whole page."""

    title: str
    lead: str
    headlines: Sequence[Headline]
    sections: Sequence[Section]
    origin: Origin


def describe_machine(system: dict[str, Any]) -> str:
    """Return processor or GPU, threads and torch's version, as far as a ``system.json`` holds them."""
    gpus = system.get("gpus")
    parts = []
    if isinstance(gpus, list) and gpus:
        names = {str(name) for name in gpus}
        parts.append(f"{len(gpus)} × {names.pop()}" if len(names) == 1 else ", ".join(map(str, gpus)))
    elif system.get("processor"):
        parts.append(_text(system["processor"]))
        if number(system.get("threads")) is not None:
            parts.append(f"{system['threads']} thread{'' if system['threads'] == 1 else 's'}")
    packages = system.get("packages")
    if isinstance(packages, dict) and packages.get("torch"):
        parts.append(f"torch {packages['torch']}")
    return ", ".join(parts)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def lossy_mark(is_lossy: object) -> str:
    """Return the mark that follows bits per byte of a lossy tokenizer; empty for others."""
    return LOSSY if is_lossy else ""


def format_value(value: object, digits: int = 4) -> str:
    """Return a human-readable value: numbers grouped and rounded to ``digits``, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**18 else _format_huge(value, digits)
    if isinstance(value, float):
        return format_float(value, digits)
    if isinstance(value, dict) and is_spread(value):
        median, lowest, highest = (format_value(value[key], digits) for key in ("median", "lowest", "highest"))
        return f"{median} ({lowest} to {highest})"
    if isinstance(value, (list, tuple)):
        has_records = any(isinstance(item, dict) and not is_spread(item) for item in value)
        is_short = len(value) <= 8 and not has_records
        joined = ", ".join(format_value(item, digits) for item in value) if is_short else f"{len(value):,} items"
        return shortened(joined, _LONGEST_CELL)
    if isinstance(value, dict):
        return f"{len(value):,} value{'' if len(value) == 1 else 's'}" if value else "empty"
    return shortened(value, _LONGEST_CELL)


def _format_huge(value: int, digits: int) -> str:
    try:
        return f"{float(value):.{digits}g}"
    except OverflowError:
        return f"about {'−' if value < 0 else ''}1e{round((value.bit_length() - 1) * math.log10(2))}"


def format_float(value: float, digits: int = 4) -> str:
    """Return ``value`` with ``digits`` significant digits, grouped when large and in scientific notation when tiny."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size >= 15:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - size)}f}"


def signed(value: float | None, digits: int = 4) -> str:
    """Return a difference with its sign (a true minus)."""
    if value is None or math.isnan(value):
        return "–"
    return f"{'+' if value > 0 else '−' if value < 0 else '±'}{format_float(abs(value), digits)}"

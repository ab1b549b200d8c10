"""Paths, folders, globs and URLs enter; the files of a corpus leave, with their sizes, dealt to parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from psannlm.data.files import file_stamp, find_all, is_compressed, split_suffix
from psannlm.errors import ConfigError, CorpusError
from psannlm.prep.settings import STDIN

_NAMES_KEPT = 5


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus: ``n_bytes`` as stored (None for standard input), ``stamp`` when it was last changed."""

    path: str
    n_bytes: int | None
    stamp: str = ""

    @property
    def kind(self) -> str:
        """``.txt``, ``.jsonl``, ``.ndjson``, ``.parquet``, or any other ending, which is read as plain text."""
        return split_suffix(self.path)[0]

    @property
    def is_compressed(self) -> bool:
        """Whether the bytes of its text are others than those that are stored, whatever the file is called."""
        return is_compressed(self.path)

    def as_dict(self) -> dict[str, Any]:
        """Return the file as it stands in a plan."""
        return {"path": self.path, "bytes": self.n_bytes, "stamp": self.stamp}


@dataclass
class Drops:
    """Counts what was left out, by reason, and names the first few."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one."""
        self.merge(reason, 1, [name])

    def merge(self, reason: str, count: int, names: Sequence[str]) -> None:
        """Count several, of which ``names`` are the first."""
        self.counts[reason] += count
        kept = self.examples.setdefault(reason, [])
        kept += names[: _NAMES_KEPT - len(kept)]

    def lines(self) -> list[str]:
        """Return a line for each reason, for people."""
        said = []
        for reason, count in sorted(self.counts.items()):
            names = self.examples[reason]
            more = ", ..." if count > len(names) else ""
            said.append(f"left out: {reason} x {count:,} ({', '.join(names)}{more})")
        return said


def find_sources(patterns: Sequence[str], drops: Drops) -> list[SourceFile]:
    """Return the files that ``patterns`` name, in reading order; ``-`` is standard input.

    Raises:
        CorpusError: names every path that is missing or cannot be read.
        ConfigError: standard input is named more than once.
    """
    if patterns.count(STDIN) > 1:
        raise ConfigError("'-' names standard input, which can be read once only; give it once")
    found = iter(find_all([pattern for pattern in patterns if pattern != STDIN], drops.add))
    sources: list[SourceFile] = []
    for pattern in patterns:
        if pattern == STDIN:
            sources.append(SourceFile(STDIN, None))
        else:
            sources += [SourceFile(path, *file_stamp(path)) for path in next(found)]
    return sources


def refuse_changed(source: SourceFile) -> None:
    """Raise CorpusError if a file is not as it was when its corpus was planned."""
    if source.n_bytes is None:
        return
    n_bytes, stamp = file_stamp(source.path)
    if (n_bytes, stamp) != (source.n_bytes, source.stamp):
        what = f"{source.n_bytes:,} bytes then, {n_bytes:,} now" if n_bytes != source.n_bytes else "written to since"
        raise CorpusError(
            f"{source.path} changed while the corpus was prepared ({what}); what was made of it is of two minds. "
            "Remove the folder and prepare it anew when the corpus is at rest"
        )


def deal(sources: Sequence[SourceFile], n_parts: int) -> list[list[int]]:
    """Return for each part the indices of its files, in reading order; parts are as equal in bytes as files allow.

    The largest file goes first, each to the part that has least: the same files give the same parts everywhere.

    Raises:
        ConfigError: standard input is among the sources, or there are fewer files than parts.
    """
    if n_parts > 1 and any(source.n_bytes is None for source in sources):
        raise ConfigError("standard input cannot be dealt to parts; save it to files first")
    if n_parts > len(sources):
        raise ConfigError(
            f"{n_parts} parts of {len(sources)} files leave some with none: whole files are dealt to parts. "
            "Split the files, or name fewer parts"
        )
    parts: list[list[int]] = [[] for _ in range(n_parts)]
    sizes = [0] * n_parts
    for index in sorted(range(len(sources)), key=lambda index: (-(sources[index].n_bytes or 0), index)):
        least = min(range(n_parts), key=lambda part: (sizes[part], len(parts[part]), part))
        parts[least].append(index)
        sizes[least] += sources[index].n_bytes or 0
    return [sorted(part) for part in parts]

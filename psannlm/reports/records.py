"""Records that tokenize, prep and train leave beside their results, for reports: figures, machine and table."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from psannlm.reports.plain import Unreadable, read_json
from psannlm.reports.store import system_info, write_json
from psannlm.storage import explain_write_errors, write_text

FIGURES_FILE, SYSTEM_FILE, TABLE_FILE = "metrics.json", "system.json", "table.txt"
KIND_KEY = "record"
KINDS = ("tokenize", "prep", "train")
_DEEPEST = 2


def write_record(folder: Path, kind: str, figures: dict[str, Any], table: str) -> bool:
    """Write ``metrics.json``, ``system.json`` and ``table.txt`` to ``folder``; an earlier record is replaced.

    A run folder keeps the ``system.json`` of its training. Returns false, and writes nothing, where a file of one of
    these names is there that is not part of a record.

    Raises:
        StorageError: the record cannot be written.
    """
    names = [FIGURES_FILE, TABLE_FILE, *([] if kind == "train" else [SYSTEM_FILE])]
    if any((folder / name).exists() for name in names) and read_record(folder) is None:
        return False
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # The figures come first: they mark the other files as ours.
    write_json(folder / FIGURES_FILE, {KIND_KEY: kind, **figures})
    if kind != "train":
        write_json(folder / SYSTEM_FILE, system_info())
    write_text(folder / TABLE_FILE, table)
    return True


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the figures of the record in ``folder``; None where there is none, or ``metrics.json`` is not one."""
    path = folder / FIGURES_FILE
    if not path.is_file():
        return None
    try:
        figures = read_json(path)
    except Unreadable:
        return None
    return figures if figures.get(KIND_KEY) in KINDS else None


def find_records(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the folders of records of tokenize and prep at most two levels below ``root``, and their kinds.

    Links are not followed, and hidden folders are left out.
    """
    for folder, names, files in os.walk(root):
        here = Path(folder)
        if FIGURES_FILE in files:
            record = read_record(here)
            if record is not None and record[KIND_KEY] != "train":
                yield here, str(record[KIND_KEY])
        deep = len(here.relative_to(root).parts) >= _DEEPEST
        names[:] = [] if deep else sorted(name for name in names if not name.startswith("."))

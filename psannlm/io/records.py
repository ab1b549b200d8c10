"""Records of tokenize, prep and train beside their results: figures, machine and table, read by reports."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from psannlm.errors import StorageError
from psannlm.io.atomic import explain_write_errors, is_plain_file, read_small, write_text
from psannlm.io.filenames import utf8
from psannlm.io.readers import Unreadable, read_json
from psannlm.io.remote_folder import RemoteFolder
from psannlm.io.run_metadata import system_info, write_json

FIGURES_FILE, SYSTEM_FILE, TABLE_FILE = "metrics.json", "system.json", "table.txt"
LOG_FILE, SUMMARY_FILE = "metrics.jsonl", "summary.json"
_PAGES = ("report.html", "report.md")
KIND_KEY, _TABLE_KEY = "record", "table_sha256"
_MOST_BYTES = 64 << 20
KINDS = ("tokenize", "prep", "train")
_DEEPEST = 2
_LINE_BYTES = 1 << 20


def write_record(folder: Path | str, kind: str, figures: dict[str, Any], table: str) -> bool:
    """Write ``metrics.json``, ``system.json`` and ``table.txt`` to ``folder``; an earlier record is replaced.

    A folder given as text is a URL. A run folder keeps the ``system.json`` of its training. Returns false, and writes
    nothing, where a file of one of these names is there that is not part of a record.

    Raises:
        StorageError: the record cannot be written.
    """
    if isinstance(folder, str):
        return _write_remote_record(folder, kind, figures, table)
    names = [FIGURES_FILE, TABLE_FILE, *([] if kind == "train" else [SYSTEM_FILE])]
    if not all(is_own_file(folder / name) for name in names if os.path.lexists(folder / name)):
        return False
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # The figures are written first: they contain the hash that proves that psannlm wrote the table.
    figures = {KIND_KEY: kind, **figures, _TABLE_KEY: hashlib.sha256(utf8(table)).hexdigest()}
    write_json(folder / FIGURES_FILE, figures)
    if kind != "train":
        write_json(folder / SYSTEM_FILE, system_info())
    write_text(folder / TABLE_FILE, table)
    return True


def _write_remote_record(url: str, kind: str, figures: dict[str, Any], table: str) -> bool:
    remote = RemoteFolder(url, StorageError, is_output=True)
    names = (FIGURES_FILE, SYSTEM_FILE, TABLE_FILE)
    if remote.names().intersection(names) and not _is_record(remote, kind):
        return False
    with tempfile.TemporaryDirectory(prefix="psannlm-record-") as scratch:
        write_record(Path(scratch), kind, figures, table)
        for name in names:
            remote.put(Path(scratch) / name, name)
    return True


def _is_record(remote: RemoteFolder, kind: str) -> bool:
    if (remote.size(FIGURES_FILE) or 0) > _MOST_BYTES:
        return False
    try:
        former = json.loads(remote.read(FIGURES_FILE) or b"")
    except (ValueError, RecursionError):
        return False
    return isinstance(former, dict) and former.get(KIND_KEY) == kind


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the figures of the record in ``folder``; None if there is no valid record."""
    path = folder / FIGURES_FILE
    if not path.is_file():
        return None
    try:
        figures = read_json(path)
    except Unreadable:
        return None
    return figures if figures.get(KIND_KEY) in KINDS else None


def is_own_file(path: Path) -> bool:
    """Whether ``path`` is a file of a record written by :func:`write_record`, judged by its content."""
    content = read_small(path, _MOST_BYTES)
    if content is None:
        return False
    if path.name == FIGURES_FILE:
        return read_record(path.parent) is not None
    if path.name == TABLE_FILE:
        record = read_record(path.parent) or {}
        return record.get(_TABLE_KEY) == hashlib.sha256(content).hexdigest()
    try:
        system = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(system, dict) and {"time_utc", "psannlm", "platform", "packages"} <= system.keys()


def is_own_log(path: Path) -> bool:
    """Return whether the file begins like the log of a run: empty, or with a row that has a ``kind`` and a ``step``."""
    try:
        with open(path, "rb") as file:
            first = file.readline(_LINE_BYTES)
    except OSError:
        return False
    if not first:
        return True
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("kind"), str)


def is_own_output(path: Path) -> bool:
    """Return whether psannlm wrote a file that could be text of a corpus, judged by its content.

    It is the log of a run, the table of a record or report, or the page of a report, and the ``system.json`` of
    psannlm lies beside it.
    """
    if path.name not in (LOG_FILE, TABLE_FILE, *_PAGES) or not is_plain_file(path):
        return False
    if not is_own_file(path.with_name(SYSTEM_FILE)):
        return False
    if path.name in _PAGES:
        return all(is_plain_file(path.with_name(name)) for name in (*_PAGES, FIGURES_FILE))
    if path.name == LOG_FILE:
        return is_own_log(path)
    if read_record(path.parent) is not None:
        return is_own_file(path)
    return any(is_plain_file(path.with_name(name)) for name in (FIGURES_FILE, SUMMARY_FILE))


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

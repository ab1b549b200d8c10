"""Reading of report folders and run folders, with a list of what cannot be read and why."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from psannlm.display import shortened
from psannlm.errors import ConfigError, nearest
from psannlm.io.artifact_schema import Figures
from psannlm.io.readers import Unreadable, read_json, read_text
from psannlm.io.records import find_records
from psannlm.reports.runs import SYSTEM_FILE, RunRecord, find_runs, read_run
from psannlm.reports.schemas.kinds import read_artifact_figures

FIGURES_FILES = ("metrics.json", "summary.json", "tasks.json")
TABLE_FILE = "table.txt"
# Reports themselves are not reported again.
OWN_KIND = "benchmarks"
RUNS_KIND = "runs"
# Results that a repository publishes: they come from other machines, so only --published includes them.
PUBLISHED_FOLDER = "published"
_NAME = re.compile(r"([0-9]{8})_([0-9]{6})(?:_.+)?")
_AGO = re.compile(r"([0-9]{1,5})([hd])")
_PICTURE = ".png"
_LARGEST_TABLE_BYTES = 1 << 20
_LONGEST_PROBLEM = 200


@dataclass(frozen=True)
class Artifact:
    """One folder ``reports/<kind>/<ts>``: figures, machine and printed table.

    ``metrics`` are the figures by the schema of the kind; None where they do not fit it, for the reason in ``problem``,
    or there is none.
    """

    folder: Path
    kind: str
    when: datetime
    figures: dict[str, Any]
    system: dict[str, Any]
    table: str
    pictures: tuple[Path, ...]
    metrics: Figures | None = None
    problem: str = ""

    @property
    def timestamp(self) -> str:
        """``when`` in ISO 8601."""
        return self.when.isoformat(timespec="seconds")


@dataclass(frozen=True)
class Unread:
    """A file or folder that could not be read, and the reason."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Gathered:
    """Everything that was found, oldest first."""

    artifacts: list[Artifact] = field(default_factory=list)
    runs: list[RunRecord] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to report, not even something unreadable."""
        return not (self.artifacts or self.runs or self.unread)


def parse_since(text: str, now: datetime | None = None) -> datetime:
    """Return the moment that ``text`` names: ``2026-11-24``, ``20261124_101500``, ISO 8601, ``36h`` or ``7d`` ago.

    Raises:
        ConfigError: it is none of these.
    """
    if ago := _AGO.fullmatch(text):
        hours = int(ago[1]) * (24 if ago[2] == "d" else 1)
        return (now or datetime.now(timezone.utc)) - timedelta(hours=hours)
    for form in ("%Y%m%d_%H%M%S", "%Y%m%d"):
        try:
            return datetime.strptime(text, form).replace(tzinfo=timezone.utc)
        except ValueError:
            continue
    when = _iso(text)
    if when is None:
        raise ConfigError(f"--since {text!r} is not a time; write 2026-11-24, 20261124_101500, 36h or 7d")
    return when


def gather(
    reports: Path,
    runs: Sequence[Path],
    *,
    since: datetime | None = None,
    kinds: Collection[str] = (),
    published: bool = False,
    records: Sequence[Path] = (),
) -> Gathered:
    """Read every ``reports/<kind>/<ts>`` and every run at or below the folders ``runs``.

    Args:
        since: leave out what is older.
        kinds: the kinds to take (``runs`` is one); all of them when empty.
        published: read ``reports/published/<kind>/<ts>`` too.
        records: folders at or below which records of ``psannlm tokenize`` and ``prep`` are looked for.

    Raises:
        ConfigError: a requested kind does not exist, or there are no published results.
    """
    found = Gathered()
    there = [path for path in _folders(reports) if path.name not in (OWN_KIND, PUBLISHED_FOLDER)]
    if published:
        kept = reports / PUBLISHED_FOLDER
        if not kept.is_dir():
            raise ConfigError(f"there is no {kept}; leave out --published, or name its parent folder with --reports")
        there += [kept] if kept.is_symlink() else _folders(kept)
    recorded = {folder.resolve(): (folder, name) for root in records for folder, name in find_records(root)}
    inner = [path.resolve() for path in (reports, *there)]
    recorded = {path: found for path, found in recorded.items() if not any(path.is_relative_to(each) for each in inner)}
    known = list(dict.fromkeys([*(path.name for path in there), RUNS_KIND, *(name for _, name in recorded.values())]))
    for name in kinds:
        if name not in known:
            raise ConfigError(
                f"there is no {reports}/{name}{nearest(name, known)}; existing kinds: {', '.join(sorted(known))}"
            )
    for kind in there:
        if not kinds or kind.name in kinds:
            for folder in [kind] if kind.is_symlink() else _folders(kind, found.unread):
                _add_artifact(found, folder, since)
    for folder, name in recorded.values():
        if not kinds or name in kinds:
            _add_artifact(found, folder, since, name)
    if not kinds or RUNS_KIND in kinds:
        for folder, name in _run_folders(runs):
            _add_run(found, folder, name, since)
    found.artifacts.sort(key=lambda artifact: (artifact.kind, artifact.when, artifact.folder.name))
    found.runs.sort(key=lambda run: (run.timestamp or "", run.name))
    return found


def _folders(path: Path, unread: list[Unread] | None = None) -> list[Path]:
    """Return the folders and links to folders in ``path``; one that cannot be listed is added to ``unread``."""
    try:
        return sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []
    except OSError as error:
        if unread is not None:
            unread.append(Unread(path, f"cannot be listed: {error.strerror or error}"))
        return []


def _run_folders(roots: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Yield each run once, with an unambiguous name: its path below the folder that was given."""
    seen: set[Path] = set()
    for root in roots:
        for folder in find_runs(root):
            if folder.resolve() not in seen:
                seen.add(folder.resolve())
                inner = folder.relative_to(root)
                yield folder, str(inner) if inner.parts else folder.resolve().name


def _add_artifact(found: Gathered, folder: Path, since: datetime | None, kind: str | None = None) -> None:
    if folder.is_symlink():
        # What it points to may belong to somebody else, or be counted already where it is.
        found.unread.append(Unread(folder, "a symbolic link, which a report does not follow"))
        return
    try:
        artifact = _read_artifact(folder, found.unread, kind or folder.parent.name)
    except (Unreadable, OSError) as error:
        if since is None or _when(folder, {}) >= since:
            found.unread.append(Unread(folder, str(error)))
        return
    if since is None or artifact.when >= since:
        found.artifacts.append(artifact)


def _read_artifact(folder: Path, unread: list[Unread], kind: str) -> Artifact:
    path = next((folder / name for name in FIGURES_FILES if os.path.lexists(folder / name)), None)
    if path is None:
        raise Unreadable(f"neither {' nor '.join(FIGURES_FILES)} is there: not an artifact that psannlm writes")
    figures = read_json(path)
    system: dict[str, Any] = {}
    table = ""
    for name in (SYSTEM_FILE, TABLE_FILE):
        if not os.path.lexists(folder / name):
            continue
        try:
            if name == SYSTEM_FILE:
                system = read_json(folder / name)
            else:
                table = read_text(folder / name, _LARGEST_TABLE_BYTES)
        except Unreadable as error:
            unread.append(Unread(folder / name, str(error)))
    pictures = tuple(sorted(child for child in folder.iterdir() if child.suffix == _PICTURE and not child.is_dir()))
    metrics, problem = None, ""
    try:
        metrics = read_artifact_figures(kind, figures)
    except Unreadable as error:
        problem = shortened(str(error), _LONGEST_PROBLEM)
    return Artifact(folder, kind, _when(folder, system), figures, system, table, pictures, metrics, problem)


def _add_run(found: Gathered, folder: Path, name: str, since: datetime | None) -> None:
    try:
        run = read_run(folder, name)
    except Unreadable as error:
        if since is None or _when(folder, {}) >= since:
            found.unread.append(Unread(folder, str(error)))
        return
    if since is not None and _when(folder, run.system) < since:
        return
    found.runs.append(run)
    found.unread.extend(Unread(folder, problem) for problem in run.problems)


def _when(folder: Path, system: dict[str, Any]) -> datetime:
    """Return the time of a folder: from its name, else its ``system.json``, else the file system."""
    if match := _NAME.fullmatch(folder.name):
        try:
            return datetime.strptime(match[1] + match[2], "%Y%m%d%H%M%S").replace(tzinfo=timezone.utc)
        except ValueError:
            pass
    stated = system.get("time_utc")
    if isinstance(stated, str) and (when := _iso(stated)) is not None:
        return when
    try:
        return datetime.fromtimestamp(folder.stat().st_mtime, timezone.utc)
    except (OSError, ValueError, OverflowError):
        return datetime.fromtimestamp(0, timezone.utc)


def _iso(text: str) -> datetime | None:
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return None
    try:
        return (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)
    except OverflowError:  # in the first or last hours of the calendar
        return None

"""Finding the files of a corpus: paths, folders, globs and URLs.

All problems with the paths of a corpus are found before the first byte is read, and are reported together.
"""

from __future__ import annotations

import glob
import importlib
import os
import re
import stat
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from psannlm.config.files import MANIFEST_FILE
from psannlm.errors import CorpusError, install_extra, nearest
from psannlm.io.hub import content_stamp, pinned
from psannlm.io.lfs_pointers import pointer_at
from psannlm.io.records import is_own_output
from psannlm.io.remote_folder import explain_remote_errors
from psannlm.io.urls import file_system, is_remote, literal_beginning, local_path, protocol_of, refusal

STDIN = "-"
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", *JSON_LINES_SUFFIXES)
COMPRESSIONS = ("", ".gz", ".zst")
KNOWN_SUFFIXES = (*(text + packed for text in TEXT_SUFFIXES for packed in COMPRESSIONS), ".parquet")
_KNOWN = "a corpus is .txt, .jsonl or .ndjson, each also .gz or .zst, or .parquet"
# A file named explicitly is read as plain text, whatever its suffix, except for these formats.
_NOT_PLAIN_TEXT = (".json", ".csv", ".tsv", ".zip", ".tar", ".bz2", ".xz", ".7z", ".pdf", ".docx", ".odt", ".epub")
_SHARD = re.compile(r"/train_[0-9]{5,}\.safetensors$")
_LEADS_BACK = "this link leads back to"
_PROBLEMS_SHOWN = 20
# Keys for the time or the version of a file in the file systems of fsspec.
_STAMPS = ("etag", "ETag", "mtime", "LastModified", "last_modified", "updated", "created")

Drop = Callable[[str, str], None]


def split_suffix(path: str) -> tuple[str, str]:
    """Return (kind, compression) of a file name in lower case: ``a.TXT.gz`` gives ``(".txt", ".gz")``."""
    if protocol_of(path) in ("http", "https"):
        path = re.split("[?#]", path, maxsplit=1)[0]
    name, last = os.path.splitext(os.path.basename(path).lower())
    if last in (".gz", ".zst"):
        return os.path.splitext(name)[1], last
    return last, ""


def find_all(patterns: Sequence[str], drop: Drop) -> list[list[str]]:
    """Return the files of each of several paths, folders, globs or URLs; a repeated file counts only the first time.

    Raises:
        CorpusError: a path is missing or cannot be read; names all of them.
    """
    found: list[list[str]] = []
    problems: list[str] = []
    seen: set[str] = set()
    for pattern in patterns:
        files, wrong = find_files(pattern, drop)
        problems += wrong
        found.append([])
        for path in files:
            real = path if is_remote(path) else os.path.realpath(path)
            if real in seen:
                drop("file named before", path)
            else:
                found[-1].append(path)
            seen.add(real)
    if problems:
        more = [f"  and {len(problems) - _PROBLEMS_SHOWN:,} more"] if len(problems) > _PROBLEMS_SHOWN else []
        shown = [f"  {problem}" for problem in problems[:_PROBLEMS_SHOWN]]
        raise CorpusError("\n".join(["cannot read the corpus:", *shown, *more]))
    return found


def find_files(pattern: str, drop: Drop) -> tuple[list[str], list[str]]:
    """Return (files, problems) of one path, folder, glob or URL; files are in the same order on every machine.

    Folders are searched recursively. Hidden entries, files of other kinds and output of psannlm (logs, tables, reports)
    are left out; ``drop(reason, name)`` is called for each. A problem is one line with its cause and remedy.
    """
    path = os.path.expanduser(pattern)
    if protocol_of(pattern) is not None:
        if problem := refusal(pattern):
            return [], [problem]
        if is_remote(pattern):
            return _find_remote(pattern, drop)
        named = local_path(pattern)
        if named is None:
            return [], [f"{pattern}: names another machine; write file:///path, or the path alone"]
        path = named
    if os.path.lexists(path):
        return _look_into([path], drop)
    if glob.has_magic(path):
        return _look_into_glob(pattern, path, drop)
    return [], [f"{pattern}: no such file or folder; {_near(path)}"]


def _look_into_glob(pattern: str, path: str, drop: Drop) -> tuple[list[str], list[str]]:
    root, expression = literal_beginning(path)
    if "**" in path:
        # glob follows links: two links in a cycle would be visited 2 ** 40 times.
        _, circles = _look_into([root], lambda reason, name: None)
        if circles := [problem for problem in circles if _LEADS_BACK in problem]:
            return [], circles
    matches = sorted(glob.glob(expression, recursive=True))
    if not matches:
        return [], [f"{pattern}: nothing matches; {_near(path)}"]
    matches = [match for match in matches if os.path.isdir(match) or not _is_output(match, drop)]
    if not matches:
        return [], [f"{pattern}: only output of psannlm matches; name files of text"]
    suffix = os.path.splitext(path)[1]
    if suffix and not glob.has_magic(suffix):
        # A pattern with an explicit suffix, such as *.md, selects files like a plain path.
        return _look_into(matches, drop)
    # With ** a folder and the files in it match; each file is returned once.
    found, problems = _look_into([match for match in matches if os.path.isdir(match) or _is_known(match, drop)], drop)
    return list(dict.fromkeys(found)), problems


def _near(path: str) -> str:
    """Return a hint for a missing path: where it was searched, and the most similar name."""
    missing, parent = path, os.path.dirname(path.rstrip("/")) or "."
    while not os.path.isdir(parent):
        missing, parent = parent, os.path.dirname(parent.rstrip("/")) or "."
    try:
        siblings = os.listdir(parent)
    except OSError:
        siblings = []
    found = nearest(os.path.basename(missing.rstrip("/")), siblings)
    return f"looked in {os.path.abspath(parent)}{found or '; check the spelling, or the working folder'}"


def _look_into(paths: list[str], drop: Drop) -> tuple[list[str], list[str]]:
    files: list[str] = []
    problems: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            before = len(files), len(problems)
            _walk(path, (), set(), files, problems, drop)
            if before == (len(files), len(problems)):
                problems.append(f"{path}: no text in this folder; {_KNOWN}")
        elif problem := _unreadable(path):
            problems.append(problem)
        else:
            files.append(path)
    return files, problems


def _walk(
    folder: str, above: tuple[str, ...], visited: set[str], files: list[str], problems: list[str], drop: Drop
) -> None:
    """Collect the files and problems below ``folder``; ``above``: its parent folders, links resolved."""
    real = os.path.realpath(folder)
    if real in above:
        problems.append(f"{folder}: {_LEADS_BACK} {real}, which holds it; remove the link")
        return
    if real in visited:
        drop("folder linked twice", folder)
        return
    visited.add(real)
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        problems.append(f"{folder}: {error.strerror}; make the folder readable, or name the files you want")
        return
    for name in names:
        path = os.path.join(folder, name)
        if name.startswith("."):
            drop("hidden entry", path)
        elif os.path.isdir(path):
            _walk(path, (*above, real), visited, files, problems, drop)
        elif _is_known(path, drop) and not _is_output(path, drop):
            if problem := _unreadable(path):
                problems.append(problem)
            else:
                files.append(path)


def _is_known(path: str, drop: Drop) -> bool:
    if path.lower().endswith(KNOWN_SUFFIXES):
        return True
    drop("file of another kind", path)
    return False


def _is_output(path: str, drop: Drop) -> bool:
    """Return whether psannlm wrote the file: runs and reports in a corpus folder must not become part of the corpus."""
    if not is_own_output(Path(path)):
        return False
    drop("output of psannlm", path)
    return True


def _unreadable(path: str) -> str | None:
    """Return why ``path`` cannot be read as a corpus, or None; a pipe is detected without opening it."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if problem := pointer_at(path):
            return f"{path}: {problem}"
        link = " (a broken link, or a cycle of links)" if os.path.islink(path) else ""
        return f"{path}: {error.strerror}{link}; repair or remove it"
    if not stat.S_ISREG(mode):
        return f"{path}: not a regular file (a pipe, socket or device); save its text to a .txt file first"
    if not os.access(path, os.R_OK):
        return f"{path}: permission denied; make the file readable"
    if problem := pointer_at(path):
        return f"{path}: {problem}"
    return _unknown_kind(path)


def _unknown_kind(path: str) -> str | None:
    """Return why a file of this name cannot be read, or None."""
    kind, compression = split_suffix(path)
    if kind in _NOT_PLAIN_TEXT or (kind == ".parquet" and compression):
        return f"{path}: {kind}{compression} cannot be read; {_KNOWN}: convert it to .jsonl, one JSON object a line"
    for needed, module in ((".zst", "zstandard"), (".parquet", "pyarrow")):
        if needed in (kind, compression) and (problem := missing_module(module)):
            return f"{path}: {problem}"
    return None


def missing_module(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"reading it takes the package {module} ({error}); {install_extra('data')}"
    return None


def remote_file_system(url: str) -> tuple[Any, str]:
    """Return (file system of fsspec, path in it) of a URL. Raises CorpusError if it may not or cannot be read."""
    if problem := missing_module("fsspec"):
        raise CorpusError(f"{url}: {problem}")
    with explained_remote_errors(url):
        return file_system(url)


def explained_remote_errors(url: str) -> AbstractContextManager[None]:
    """Return a context that turns errors of fsspec and its libraries about a URL into one line."""
    return explain_remote_errors(url, CorpusError)


def _find_remote(url: str, drop: Drop) -> tuple[list[str], list[str]]:
    with explained_remote_errors(url):
        url = pinned(url)
    system, path = remote_file_system(url)
    with explained_remote_errors(url):
        is_whole = system.isfile(path)
        if is_whole:
            names = [path]
        elif system.isdir(path):
            names = sorted(system.find(path))
        elif not glob.has_magic(path):
            return [], [f"{url}: no such file or folder; check the spelling"]
        elif not (names := sorted(system.glob(path))):
            return [], [f"{url}: nothing matches; check the spelling"]
        urls = [system.unstrip_protocol(name) for name in names if is_whole or system.isfile(name)]
    files = urls if is_whole else [name for name in _without_shards(urls, drop) if _is_known(name, drop)]
    if not files:
        return [], [f"{url}: no text there; {_KNOWN}"]
    problems = [problem for name in files if (problem := _unknown_kind(name))]
    return files, problems


def _without_shards(urls: list[str], drop: Drop) -> list[str]:
    """Leave out what psannlm prep wrote: the tables beside its shards are not text."""
    folders = {url.rpartition("/")[0] for url in urls if url.endswith(f"/{MANIFEST_FILE}")}
    folders &= {url.rpartition("/")[0] for url in urls if _SHARD.search(url)}
    for url in urls:
        if url.rpartition("/")[0] in folders:
            drop("output of psannlm", url)
    return [url for url in urls if url.rpartition("/")[0] not in folders]


def file_bytes(path: str) -> int:
    """Return the size of a file in bytes, as stored. Raises CorpusError if it does not exist."""
    return int(file_stamp(path)[0])


def file_stamp(path: str) -> tuple[int, str]:
    """Return (bytes, time or version as text) of a file; equal stamps mean equal content.

    Raises:
        CorpusError: the file does not exist, or its size is unknown.
    """
    if not is_remote(path):
        try:
            status = os.stat(path)
        except OSError as error:
            raise CorpusError(f"{path}: cannot be read: {error.strerror or error}") from error
        return status.st_size, str(status.st_mtime_ns)
    system, name = remote_file_system(path)
    with explained_remote_errors(path):
        known = system.info(name)
    if not isinstance(known.get("size"), int):
        raise CorpusError(f"{path}: its size is unknown; copy it to a file first")
    if (stamp := content_stamp(known)) is not None:
        return known["size"], stamp
    stamps = [str(known[key]) for key in _STAMPS if known.get(key) is not None]
    return known["size"], stamps[0] if stamps else ""

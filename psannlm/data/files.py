"""Files, folders, globs and URLs as a person wrote them enter; files of text leave, opened through their compression.

Everything wrong with the paths of a corpus is found before the first byte is read, and said at once.
"""

from __future__ import annotations

import glob
import gzip
import importlib
import io
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from psannlm.errors import CorpusError, nearest
from psannlm.pointers import POINTER_BYTES, pointer_at, pointer_in, refuse_pointer
from psannlm.reports.records import is_own_output

TEXT_SUFFIXES = (".txt", ".jsonl")
COMPRESSIONS = ("", ".gz", ".zst")
KNOWN_SUFFIXES = (*(text + packed for text in TEXT_SUFFIXES for packed in COMPRESSIONS), ".parquet")
_KNOWN = "a corpus is .txt or .jsonl, each also .gz or .zst, or .parquet"
# Named outright, any other file is read as plain text; these would be read as something their author did not mean.
_NOT_PLAIN_TEXT = (".json", ".csv", ".tsv", ".zip", ".tar", ".bz2", ".xz", ".7z", ".pdf", ".docx", ".odt", ".epub")
_CHUNK_BYTES = 1 << 20
_LEADS_BACK = "this link leads back to"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PROBLEMS_SHOWN = 20
# What file systems behind fsspec call the time, or the version, of a file.
_STAMPS = ("etag", "ETag", "mtime", "LastModified", "last_modified", "updated", "created")

Drop = Callable[[str, str], None]
Seen = Callable[[memoryview], object]


def split_suffix(path: str) -> tuple[str, str]:
    """Return (kind, compression) of a file name in small letters: ``a.TXT.gz`` gives ``(".txt", ".gz")``."""
    name, last = os.path.splitext(os.path.basename(path).lower())
    if last in (".gz", ".zst"):
        return os.path.splitext(name)[1], last
    return last, ""


def is_remote(path: str) -> bool:
    """Return whether ``path`` is a URL (``memory://x``, ``file:///x``), which fsspec opens."""
    return _URL.match(path) is not None


def find_all(patterns: Sequence[str], drop: Drop) -> list[list[str]]:
    """Return the files of each of several paths, folders, globs or URLs; a file is found once, where it is named first.

    Raises:
        CorpusError: names every path that is missing or cannot be read.
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
    """Return (files, problems) of one path, folder, glob or URL, the files in an order that is the same everywhere.

    Folders are read to the bottom; hidden entries, files that are no corpus, and logs, tables and reports that psannlm
    wrote are left out, and ``drop(reason, name)`` is called for each. A problem is one line for people: what is wrong,
    and what to do.
    """
    if is_remote(pattern):
        return _find_remote(pattern, drop)
    path = os.path.expanduser(pattern)
    if os.path.lexists(path):
        return _look_into([path], drop)
    if glob.has_magic(path):
        return _look_into_glob(pattern, path, drop)
    return [], [f"{pattern}: no such file or folder; {_near(path)}"]


def _look_into_glob(pattern: str, path: str, drop: Drop) -> tuple[list[str], list[str]]:
    if "**" in path:
        # glob follows links, and would go round a circle of two links 2 ** 40 times.
        root = os.path.dirname(path[: re.search(r"[*?[]", path).start()]) or "."  # type: ignore[union-attr]
        _, circles = _look_into([root], lambda reason, name: None)
        if circles := [problem for problem in circles if _LEADS_BACK in problem]:
            return [], circles
    matches = sorted(glob.glob(path, recursive=True))
    if not matches:
        return [], [f"{pattern}: nothing matches; {_near(path)}"]
    matches = [match for match in matches if os.path.isdir(match) or not _is_output(match, drop)]
    if not matches:
        return [], [f"{pattern}: only output of psannlm matches; name files of text"]
    suffix = os.path.splitext(path)[1]
    if suffix and not glob.has_magic(suffix):
        # A pattern that spells its suffix out, such as *.md, names files as a plain path does.
        return _look_into(matches, drop)
    # With ** a folder and the files inside it both match; the files come once.
    found, problems = _look_into([match for match in matches if os.path.isdir(match) or _is_known(match, drop)], drop)
    return list(dict.fromkeys(found)), problems


def _near(path: str) -> str:
    """Return what stands nearest to a path that is missing."""
    missing, parent = path, os.path.dirname(path.rstrip("/")) or "."
    while not os.path.isdir(parent):
        missing, parent = parent, os.path.dirname(parent.rstrip("/")) or "."
    try:
        siblings = os.listdir(parent)
    except OSError:
        siblings = []
    found = nearest(os.path.basename(missing.rstrip("/")), siblings)
    return f"looked in {os.path.abspath(parent)}{found or '; check the spelling, or the folder you started in'}"


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
    """Collect the files and problems below ``folder``; ``above`` holds the folders it lies in, links resolved."""
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
    """Whether psannlm wrote the file: runs and reports in a corpus folder must not change the corpus as they grow."""
    if not is_own_output(Path(path)):
        return False
    drop("output of psannlm", path)
    return True


def _unreadable(path: str) -> str | None:
    """Return why ``path`` cannot be a file of a corpus, or None; a pipe is found out without being waited on."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if problem := pointer_at(path):
            return f"{path}: {problem}"
        link = " (a link that leads nowhere, or round in a circle)" if os.path.islink(path) else ""
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
        if needed in (kind, compression) and (problem := _missing_module(module)):
            return f"{path}: {problem}"
    return None


def _missing_module(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"reading it takes the package {module} ({error}); run pip install '.[data]' in the clone"
    return None


def _fsspec(url: str) -> Any:
    if problem := _missing_module("fsspec"):
        raise CorpusError(f"{url}: {problem}")
    return importlib.import_module("fsspec.core")


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what fsspec and the libraries under it say of a URL into one line."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "install them" if isinstance(error, ImportError) else "check the URL, and that you may read it"
        raise CorpusError(f"{url}: cannot be read: {reason}; {remedy}") from error


def _find_remote(url: str, drop: Drop) -> tuple[list[str], list[str]]:
    core = _fsspec(url)
    with _explained(url):
        system, path = core.url_to_fs(url)
        is_whole = system.isfile(path)
        names = [path] if is_whole else sorted(system.glob(path) if glob.has_magic(path) else system.find(path))
        urls = [system.unstrip_protocol(name) for name in names if is_whole or system.isfile(name)]
    files = urls if is_whole else [name for name in urls if _is_known(name, drop)]
    if not files:
        return [], [f"{url}: no text there; {_KNOWN}"]
    problems = [problem for name in files if (problem := _unknown_kind(name))]
    return files, problems


def file_bytes(path: str) -> int:
    """Return the size of a file as it is stored, in bytes. Raises CorpusError if it is gone."""
    return int(file_stamp(path)[0])


def file_stamp(path: str) -> tuple[int, str]:
    """Return (bytes, when it was last changed, in the words of its file system): two equal stamps, one content.

    Raises:
        CorpusError: the file is gone, or tells no size.
    """
    if not is_remote(path):
        try:
            status = os.stat(path)
        except OSError as error:
            raise CorpusError(f"{path}: cannot be read: {error.strerror or error}") from error
        return status.st_size, str(status.st_mtime_ns)
    core = _fsspec(path)
    with _explained(path):
        system, name = core.url_to_fs(path)
        known = system.info(name)
    if not isinstance(known.get("size"), int):
        raise CorpusError(f"{path}: its size is unknown; copy it to a file first")
    stamps = [str(known[key]) for key in _STAMPS if known.get(key) is not None]
    return known["size"], stamps[0] if stamps else ""


class _Watched(io.RawIOBase):
    """Reads from a file and shows every byte to ``seen`` in passing."""

    def __init__(self, raw: BinaryIO, seen: Seen) -> None:
        self._raw, self._seen = raw, seen

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n_bytes: int = self._raw.readinto(buffer)  # type: ignore[attr-defined]
        self._seen(memoryview(buffer)[:n_bytes])
        return n_bytes


@contextmanager
def _raw(path: str, seen: Seen | None) -> Iterator[BinaryIO]:
    opener: Any
    if is_remote(path):
        with _explained(path):
            opener = _fsspec(path).open(path, "rb", compression=None)
    else:
        opener = open(path, "rb")
    with opener as raw:
        if is_remote(path) and isinstance(size := getattr(raw, "size", None), int) and size <= POINTER_BYTES:
            # A server of a Git repository gives the pointer of a file that is in Git LFS.
            if problem := pointer_in(raw.read()):
                raise CorpusError(f"{path}: {problem}")
            raw.seek(0)
        if seen is None:
            yield raw
            return
        with io.BufferedReader(_Watched(raw, seen), _CHUNK_BYTES) as watched:
            yield watched
            # A decompressor may stop before the file does.
            while watched.read(_CHUNK_BYTES):
                pass


@contextmanager
def opened(path: str, seen: Seen | None = None) -> Iterator[BinaryIO]:
    """Yield the bytes of a file, decompressed on the way; ``seen`` is shown its stored bytes, every one and in order.

    Raises:
        CorpusError: the file cannot be opened or read, or its compression is damaged or cut short.
    """
    try:
        with _raw(path, seen) as raw:
            compression = split_suffix(path)[1]
            if compression == ".gz":
                with gzip.open(raw) as unpacked:
                    yield unpacked  # type: ignore[misc]
            elif compression == ".zst":
                yield io.BufferedReader(_ZstandardReader(raw), _CHUNK_BYTES)
            else:
                yield raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{path}: damaged or cut short ({error}); copy or compress the file again") from error
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror or error}") from error


class _ZstandardReader(io.RawIOBase):
    """Decompresses frame after frame; the package's own reader takes a file that was cut short for a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._zstandard: Any = importlib.import_module("zstandard")
        self._frame: Any = None
        self._packed = b""
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._packed or self._raw.read(_CHUNK_BYTES)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            if self._frame is None:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(packed)
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        n_bytes = min(len(buffer), len(self._ready))
        buffer[:n_bytes], self._ready = self._ready[:n_bytes], self._ready[n_bytes:]
        return n_bytes


def read_text(path: str) -> tuple[str, bool]:
    """Return the text of a whole file and whether it began with a byte order mark, which is taken off.

    Raises:
        CorpusError: as :func:`opened`, and for bytes that are not UTF-8.
    """
    if not is_remote(path):
        refuse_pointer(path, CorpusError)
    with opened(path) as file:
        content = file.read()
    return decoded(content, path, 0)


def decoded(content: bytes, path: str, offset: int) -> tuple[str, bool]:
    """Return the text of ``content``, byte ``offset`` and on of ``path``, and whether a byte order mark was taken off.

    Raises:
        CorpusError: a byte is not UTF-8; names file, place and byte.
    """
    has_mark = offset == 0 and content.startswith(b"\xef\xbb\xbf")
    skipped = 3 if has_mark else 0
    try:
        return str(memoryview(content)[skipped:], "utf-8"), has_mark
    except UnicodeDecodeError as error:
        at = offset + skipped + error.start
        byte = content[skipped + error.start]
    encoding = "utf-16" if offset == 0 and content[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
    where = f"byte {at:,}" + (" of the decompressed text" if split_suffix(path)[1] else "")
    raise CorpusError(
        f"{path}: {where} is 0x{byte:02X}, which is not UTF-8. If the file is in another encoding, convert it: "
        f"iconv -f {encoding} -t utf-8 {Path(path).name} > converted.txt"
    )

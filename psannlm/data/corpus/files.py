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
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from psannlm.data.corpus.formats import HEAD_BYTES, compression, is_binary, unicode_encoding, why_not_text
from psannlm.display import shell_argument
from psannlm.errors import CorpusError, nearest
from psannlm.io.lfs_pointers import pointer_at, pointer_in, refuse_pointer
from psannlm.io.limits import MAX_LINE_BYTES, max_document_bytes
from psannlm.io.records import is_own_output
from psannlm.io.urls import file_system, literal_beginning, local_path, protocol_of, refusal

STDIN = "-"
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", *JSON_LINES_SUFFIXES)
COMPRESSIONS = ("", ".gz", ".zst")
KNOWN_SUFFIXES = (*(text + packed for text in TEXT_SUFFIXES for packed in COMPRESSIONS), ".parquet")
_KNOWN = "a corpus is .txt, .jsonl or .ndjson, each also .gz or .zst, or .parquet"
# Named outright, any other file is read as plain text; these would be read as something their author did not mean.
_NOT_PLAIN_TEXT = (".json", ".csv", ".tsv", ".zip", ".tar", ".bz2", ".xz", ".7z", ".pdf", ".docx", ".odt", ".epub")
REPLACEMENT = "\ufffd"
_MARK = b"\xef\xbb\xbf"
_CHUNK_BYTES = 1 << 20
_LEADS_BACK = "this link leads back to"
_PROBLEMS_SHOWN = 20
# What file systems behind fsspec call the time, or the version, of a file.
_STAMPS = ("etag", "ETag", "mtime", "LastModified", "last_modified", "updated", "created")

Drop = Callable[[str, str], None]
Seen = Callable[[memoryview], object]


def split_suffix(path: str) -> tuple[str, str]:
    """Return (kind, compression) of a file name in small letters: ``a.TXT.gz`` gives ``(".txt", ".gz")``."""
    if protocol_of(path) in ("http", "https"):
        path = re.split("[?#]", path, maxsplit=1)[0]
    name, last = os.path.splitext(os.path.basename(path).lower())
    if last in (".gz", ".zst"):
        return os.path.splitext(name)[1], last
    return last, ""


def is_remote(path: str) -> bool:
    """Return whether ``path`` is a URL (``https://x``, ``s3://x``), which fsspec opens; ``file:`` names a path."""
    return protocol_of(path) not in (None, "file")


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
        # glob follows links, and would go round a circle of two links 2 ** 40 times.
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


def _file_system(url: str) -> tuple[Any, str]:
    """Return (file system of fsspec, path in it) of a URL. Raises CorpusError if it may not or cannot be read."""
    if problem := _missing_module("fsspec"):
        raise CorpusError(f"{url}: {problem}")
    with _explained(url):
        return file_system(url)


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
    system, path = _file_system(url)
    with _explained(url):
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
    system, name = _file_system(path)
    with _explained(path):
        known = system.info(name)
    if not isinstance(known.get("size"), int):
        raise CorpusError(f"{path}: its size is unknown; copy it to a file first")
    stamps = [str(known[key]) for key in _STAMPS if known.get(key) is not None]
    return known["size"], stamps[0] if stamps else ""


class _Stored(io.RawIOBase):
    """The bytes of a file, whose beginning can be looked at first; ``seen`` is shown each once, as it is read."""

    def __init__(self, raw: Any, seen: Seen | None) -> None:
        self._seen = seen
        # Standard input gives what is there, where readinto would wait for a full buffer.
        self._read_into = getattr(raw, "readinto1", raw.readinto)
        self._ahead = b""

    def readable(self) -> bool:
        return True

    def head(self, waits: bool) -> bytes:
        """Return the first bytes; without ``waits`` only those that come at once."""
        while len(self._ahead) < HEAD_BYTES:
            block = bytearray(HEAD_BYTES)
            n_bytes = self._fetch(block)
            self._ahead += block[:n_bytes]
            if not n_bytes or not waits:
                break
        return self._ahead

    def readinto(self, buffer: Any) -> int:
        if not self._ahead:
            return self._fetch(buffer)
        n_bytes = min(len(buffer), len(self._ahead))
        buffer[:n_bytes], self._ahead = self._ahead[:n_bytes], self._ahead[n_bytes:]
        return n_bytes

    def _fetch(self, buffer: Any) -> int:
        n_bytes: int = self._read_into(buffer)
        if self._seen is not None:
            self._seen(memoryview(buffer)[:n_bytes])
        return n_bytes


@contextmanager
def _raw(path: str) -> Iterator[BinaryIO]:
    if path == STDIN:
        yield sys.stdin.buffer
    elif is_remote(path):
        system, name = _file_system(path)
        with _explained(path):
            opener = system.open(name, "rb")
        with opener as raw:
            yield raw
    else:
        refuse_pointer(path, CorpusError)
        with open(path, "rb", buffering=0) as file:
            yield file


@contextmanager
def opened(path: str, seen: Seen | None = None, *, waits: bool = True) -> Iterator[BinaryIO]:
    """Yield the bytes of a file of text, decompressed on the way if they are gzip or zstd, whatever its name is.

    ``-`` is standard input, read in the same way. Parquet files, by name, come as they are stored.

    Args:
        seen: shown the stored bytes, every one and in order.
        waits: False where whoever writes to standard input may wait for an answer: the format is then judged by the
            bytes that come at once.

    Raises:
        CorpusError: the file cannot be opened or read, its compression is damaged or cut short, it does not begin as
            text does, or memory ran out.
    """
    name = shown_name(path)
    try:
        with _raw(path) as raw:
            is_table = split_suffix(path)[0] == ".parquet"
            if is_table and seen is None:
                yield raw
                return
            stored = _Stored(raw, seen)
            with io.BufferedReader(stored, _CHUNK_BYTES) as file:
                yield file if is_table else _unpacked(path, stored, file, waits)
                # A decompressor may stop before the file does.
                while seen is not None and file.read(_CHUNK_BYTES):
                    pass
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{name}: damaged or cut short ({error}); copy or compress the file again") from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CorpusError(f"{name}: cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise CorpusError(f"{name}: memory ran out while it was read; split it into smaller files or lines") from error


def is_compressed(path: str) -> bool:
    """Return whether the first bytes of a file are those of gzip or zstd. Raises CorpusError if it cannot be read."""
    try:
        with _raw(path) as raw:
            return bool(compression(_Stored(raw, None).head(waits=True)))
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror or error}") from error


def shown_name(path: str) -> str:
    """Return the name of a file in errors: standard input is ``stdin``."""
    return "stdin" if path == STDIN else path


def _unpacked(path: str, stored: _Stored, file: BinaryIO, waits: bool) -> BinaryIO:
    """Return the text of a file whose beginning was looked at, decompressed; refuse what is not text."""
    name, file_name = shown_name(path), _as_argument(path)
    head = stored.head(waits)
    packing = compression(head)
    # A server of a Git repository gives the pointer of a file that is in Git LFS.
    if problem := pointer_in(head):
        raise CorpusError(f"{name}: {problem}")
    if not packing:
        if head and (named := split_suffix(path)[1]):
            raise EOFError(f"it does not begin as a {named} file does; if it is plain text, rename it")
        if problem := why_not_text(head, file_name):
            raise CorpusError(f"{name} {problem}")
        return file
    inner: Any
    if packing == ".gz":
        inner = gzip.GzipFile(fileobj=file)
    else:
        if problem := _missing_module("zstandard"):
            raise CorpusError(f"{name}: {problem}")
        inner = importlib.import_module("psannlm.data.corpus.zstd").ZstandardReader(file, name)
    unpacked = _Stored(inner, None)
    head = unpacked.head(waits)
    if compression(head):
        raise CorpusError(f"{name} is compressed twice; unpack it once")
    if problem := why_not_text(head, "FILE"):
        raise CorpusError(f"{name}, decompressed, {problem}")
    return io.BufferedReader(unpacked, _CHUNK_BYTES)


def bounded_lines(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Yield the lines of a file with their ends; only ``\\n`` ends a line.

    Raises:
        CorpusError: a line is longer than may be held; names file and line.
    """
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise CorpusError(
                f"{name}:{number}: a line of more than {MAX_LINE_BYTES >> 20} MiB, the most that is held at once; end "
                "lines where documents end, or save so long a text as a .txt file that is read whole"
            )
        yield line


def read_whole(file: BinaryIO, name: str) -> bytes | bytearray:
    """Return all bytes of a file, of as many as one document may have.

    Raises:
        CorpusError: there are more; names the file.
    """
    content, limit = bytearray(), max_document_bytes()
    while block := file.read(_CHUNK_BYTES):
        content += block
        if len(content) > limit:
            raise CorpusError(
                f"{name}: one document of more than {limit:,} bytes, a quarter of this machine's memory; read it line "
                "by line (per_line), split it into files, or prepare it with psannlm prep, which reads it in parts"
            )
    return content


def read_text(path: str) -> tuple[str, bool]:
    """Return the text of a whole file and whether it began with a byte order mark, which is taken off.

    Raises:
        CorpusError: as :func:`opened` and :func:`read_whole`, and for bytes that are not UTF-8.
    """
    with opened(path) as file:
        content = read_whole(file, shown_name(path))
    return decoded(content, path, 0)


def read_lines(path: str) -> Iterator[str]:
    """Yield the lines of a file or of standard input (``-``) with their ends, a byte order mark taken off.

    Raises:
        CorpusError: as :func:`opened` and :func:`bounded_lines`, and for bytes that are not UTF-8.
    """
    offset = 0
    with opened(path) as file:
        for line in bounded_lines(file, shown_name(path)):
            yield decoded(line, path, offset)[0]
            offset += len(line)


def decoded(content: bytes | bytearray, path: str, offset: int, advice: str = "") -> tuple[str, bool]:
    """Return the text of ``content``, byte ``offset`` and on of ``path``, and whether a byte order mark was taken off.

    Raises:
        CorpusError: a byte is not UTF-8; names file, place and byte, and adds ``advice``.
    """
    has_mark = offset == 0 and content.startswith(_MARK)
    skipped = len(_MARK) if has_mark else 0
    try:
        return str(memoryview(content)[skipped:], "utf-8"), has_mark
    except UnicodeDecodeError as error:
        at = skipped + error.start
    where = f"byte {offset + at:,}" + (" of the decompressed text" if split_suffix(path)[1] else "")
    raise CorpusError(
        f"{shown_name(path)}: {where} is 0x{content[at]:02X}, {_other_encoding(content, path, offset)}{advice}"
    )


def _as_argument(path: str) -> str:
    """Return a file as a printed command names it, quoted for a shell."""
    return "FILE" if path == STDIN or is_remote(path) else shell_argument(path)


def _other_encoding(content: bytes | bytearray, path: str, offset: int) -> str:
    """Return what bytes may be that are not UTF-8, and what to do about them."""
    head = bytes(content[:HEAD_BYTES])
    encoding = (unicode_encoding(head) if offset == 0 else None) or "latin1"
    if encoding == "latin1" and is_binary(head):
        return "which is not UTF-8; control characters are among its bytes, so this is binary data: leave the file out"
    file_name = _as_argument(path)
    return (
        "which is not UTF-8. If the file is in another encoding, convert it: "
        f"iconv -f {encoding} -t utf-8 {file_name} > converted.txt"
    )


def replaced(content: bytes | bytearray | memoryview, text: str) -> int:
    """Return how many bytes of ``content`` are not UTF-8, given its text with U+FFFD in their place."""
    # EF begins a character wherever it stands, so each EF BF BD of the content is one U+FFFD of the author's own.
    inserted = text.count(REPLACEMENT) - bytes(content).count(REPLACEMENT.encode())
    return len(content) - (len(text.encode("utf-8")) - len(REPLACEMENT.encode()) * inserted)

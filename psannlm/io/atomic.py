"""Atomic file writes, hashes, and checks of what is in the way of a file.

POSIX promises that ``os.replace`` is atomic within one file system, so a reader sees the old file or the new one and
never a part of either. What is being written lies in a private temporary folder beside its target: the folder's name
is random and it is made by ``mkdir``, which neither follows a link nor takes a name that exists. A marker in it, bound
to the folder's own inode, proves later that a leftover is ours.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from psannlm.display import shortened
from psannlm.errors import StorageError
from psannlm.io.filenames import utf8
from psannlm.io.platform_files import SAFE_FLAGS

_CHUNK_BYTES = 1 << 20
_TEMPORARY = re.compile(r"\.psannlm-[0-9a-f]{16}\.tmp")
_MARKER = ".psannlm-temporary"
# O_NONBLOCK: opening a FIFO must not block.
_READ_FLAGS = os.O_RDONLY | SAFE_FLAGS


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits, read in constant memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk (fsync)."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders, and flushes their entries itself
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Convert an OSError while writing ``path`` to a :class:`StorageError` with a remedy."""
    try:
        yield
    except OSError as error:
        raise StorageError(_explain(path, error)) from error


def _explain(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"not enough disk space to write {path}: {error.strerror} ({_free_text(path)}). "
            "Earlier files are untouched; free some space or choose another folder."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"not allowed to write {path}: {error.strerror}. Choose a folder you may write to."
    if error.errno == errno.ENAMETOOLONG:
        longest = max(len(os.fsencode(part)) for part in path.parts or ("",))
        return (
            f"could not write {shortened(path)}: a name of {longest:,} bytes is too long, or the whole path is. "
            "Choose a shorter one."
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"could not write {path}: a file is in the place of a folder. Move it, or choose another folder."
    return f"could not write {path}: {error.strerror or error}"


def _free_text(path: Path) -> str:
    return f"{free_bytes(path) / 1e6:,.1f} MB free"


def free_bytes(path: Path) -> int:
    """Return the free bytes on the disk of ``path``, which need not exist yet."""
    existing = path.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    return shutil.disk_usage(existing).free


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Yield a path with the name of ``path`` in a new private folder beside it; the folder is removed at the end.

    What the caller writes there it moves to ``path`` itself, by ``os.replace``. The folder of ``path`` must exist.

    Raises:
        OSError: the folder cannot be made.
    """
    temporary = named_temporary(path, secrets.token_hex(8))
    temporary.parent.mkdir(mode=0o700)
    try:
        (temporary.parent / _MARKER).write_text(_marker_of(temporary.parent), encoding="ascii")
        yield temporary
    finally:
        with suppress(OSError):
            _remove_temporary(temporary.parent)


def named_temporary(path: Path, token: str) -> Path:
    """Return the path that :func:`temporary_beside` yields where ``token`` is the random part of its folder's name."""
    return path.with_name(f".psannlm-{token}.tmp") / path.name


def token_of(temporary: Path) -> str:
    """Return the random part of the path, 16 hexadecimal digits, that :func:`temporary_beside` yielded."""
    return temporary.parent.name[len(".psannlm-") : -len(".tmp")]


def _marker_of(folder: Path) -> str:
    found = folder.lstat()
    return f"temporary folder of psannlm, inode {found.st_ino}\n"


def read_small(path: Path, limit_bytes: int) -> bytes | None:
    """Return the bytes of a regular file of at most ``limit_bytes``; None for a link, a longer or a missing file."""
    content = read_head(path, limit_bytes + 1)
    return content if len(content) <= limit_bytes and is_plain_file(path) else None


def read_head(path: Path, n_bytes: int) -> bytes:
    """Return the first ``n_bytes`` of a regular file; empty for a link, a folder, a FIFO or an unreadable file."""
    try:
        handle = os.open(path, _READ_FLAGS)
    except OSError:
        return b""
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        return b""
    with open(handle, "rb") as file:
        return file.read(n_bytes)


def is_plain_file(path: Path) -> bool:
    """Return whether ``path`` itself, not the target of a link, is a regular file."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def is_plain_folder(path: Path) -> bool:
    """Return whether ``path`` itself, not the target of a link, is a folder."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of killed processes from ``folder``; only the owner of its lock may call this.

    The marker inside proves that psannlm made a temporary folder. A process may be killed before it is written: then
    the folder is empty or has only an empty marker, and it is safe to remove it.
    """
    for path in folder.iterdir():
        if not _TEMPORARY.fullmatch(path.name) or not is_plain_folder(path):
            continue
        marker = read_small(path / _MARKER, 200)
        names = [entry.name for entry in path.iterdir()]
        if marker == _marker_of(path).encode("ascii") or (marker == b"" and names == [_MARKER]):
            _remove_temporary(path)
        elif not names:
            path.rmdir()


def _remove_temporary(folder: Path) -> None:
    """Remove a temporary folder, its marker last: a process killed in between leaves what is still known as ours."""
    for path in folder.iterdir():
        if is_plain_folder(path):
            shutil.rmtree(path)
        elif path.name != _MARKER:
            path.unlink()
    shutil.rmtree(folder)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it and rename it onto ``path``, else remove it.

    Raises:
        StorageError: the disk is full or the folder cannot be written. ``path`` keeps its former content.
    """
    path = Path(path)
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(path) as temporary:
            yield temporary
            sync_file(temporary)
            os.replace(temporary, path)
            sync_file(path.parent)


def refuse_foreign(path: Path, is_ours: Callable[[Path], bool], remedy: str) -> None:
    """Raise StorageError if a file that psannlm did not write is in the way.

    Args:
        is_ours: judges a regular file by its content.
        remedy: what else the user can do, for the end of the message: ``or choose another folder with --out``.

    Raises:
        StorageError: ``path`` is a link, a folder or anything else but a regular file, or ``is_ours`` says no.
    """
    if not os.path.lexists(path):
        return
    if path.is_symlink():
        what = "it is a symbolic link"
    elif not is_plain_file(path):
        what = "it is not a regular file"
    elif is_ours(path):
        return
    else:
        what = "psannlm did not write it"
    raise StorageError(f"{path} is in the way: {what}, so it stays as it is. Move or rename it, {remedy}.")


def require_writable(path: Path) -> None:
    """Check beforehand that a file can be written at ``path``, without leaving anything behind.

    Raises:
        StorageError: ``path`` is a folder, or its parent can be neither written nor created.
    """
    with explain_write_errors(path):
        if path.is_dir():
            raise StorageError(f"could not write {path}: it is a folder. Name a file in it, or choose another name.")
        existing = path.absolute().parent
        missing: list[Path] = []
        while not existing.exists():
            missing.append(existing)
            existing = existing.parent
        try:
            for folder in reversed(missing):
                folder.mkdir()
            with temporary_beside(path) as temporary:
                temporary.touch()
        finally:
            for folder in missing:
                if folder.is_dir():
                    folder.rmdir()


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically. Raises StorageError as :func:`replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write ``content``, encoded by ``filenames.utf8``, to ``path`` atomically. Raises as :func:`replacing` does."""
    write_bytes(path, utf8(content))

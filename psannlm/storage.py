"""Files that are whole or absent: write beside, flush, rename; and the hashes that tell damage.

POSIX promises that ``os.replace`` is atomic within one file system, so a reader sees the old file or the new one and
never a part of either.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from psannlm.errors import StorageError

_CHUNK_BYTES = 1 << 20
_TEMPORARY = re.compile(r"\..+\.[0-9]+\.tmp", re.DOTALL)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits, read in constant memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Ask the system to put a file's bytes (or a folder's entries) on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write ``path`` into a :class:`StorageError` with a remedy."""
    try:
        yield
    except OSError as error:
        raise StorageError(_explain(path, error)) from error


def _explain(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"no room to write {path}: {error.strerror} ({_free_text(path)}). "
            "Earlier files are untouched; free some space or choose another folder."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"not allowed to write {path}: {error.strerror}. Choose a folder you may write to."
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"could not write {path}: a file stands where a folder must be. Move it, or choose another folder."
    return f"could not write {path}: {error.strerror or error}"


def _free_text(path: Path) -> str:
    return f"{free_bytes(path) / 1e6:,.1f} MB free"


def free_bytes(path: Path) -> int:
    """Return the room on the disk that ``path``, which need not exist yet, is or will be on."""
    existing = path.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    return shutil.disk_usage(existing).free


def temporary_beside(path: Path) -> Path:
    """Return the name that what will be ``path`` has while it is written: hidden, and told from that of others."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed while writing left in ``folder``; only its one writer may call this."""
    for path in folder.iterdir():
        if not _TEMPORARY.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it and rename it onto ``path``, else remove it.

    Raises:
        StorageError: the disk is full or the folder cannot be written. ``path`` keeps its former content.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync_file(temporary)
            os.replace(temporary, path)
            sync_file(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """Find out before the work whether a file can be put at ``path``; leaves nothing behind.

    Raises:
        StorageError: a folder stands there, or its own folder can be neither written nor made.
    """
    if path.is_dir():
        raise StorageError(f"could not write {path}: it is a folder. Name a file in it, or choose another name.")
    with explain_write_errors(path):
        existing = path.absolute().parent
        missing: list[Path] = []
        while not existing.exists():
            missing.append(existing)
            existing = existing.parent
        try:
            for folder in reversed(missing):
                folder.mkdir()
            temporary = temporary_beside(path)
            temporary.touch()
            temporary.unlink()
        finally:
            for folder in missing:
                if folder.is_dir():
                    folder.rmdir()


def write_bytes(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` atomically. Raises StorageError as :func:`replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Put ``content`` (as UTF-8) at ``path`` atomically. Raises StorageError as :func:`replacing` does."""
    write_bytes(path, content.encode("utf-8"))

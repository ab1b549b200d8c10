"""Run lock: one process at a time may write in a folder; the lock ends with its process.

The package ``filelock`` is not used because it cannot keep three guarantees of this lock:

- A released folder is as it was before. ``filelock`` leaves its lock file in place.
- A file of the user at the path of the lock, or a hard link to one, is refused and never written. ``filelock`` accepts
  any regular file.
- The error names the process that holds the lock. ``filelock`` knows no owner.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from psannlm.errors import StorageError
from psannlm.io.atomic import explain_write_errors
from psannlm.io.platform_files import SAFE_FLAGS, lock_exclusively, read_start

LOCK_FILE = ".lock"
# A lock file holds the PID of the last owner. A file with any other content is never overwritten.
_CONTENT = re.compile(rb"(?:[0-9]{1,20}\n)?")
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderInUse(StorageError):
    """Another process holds the lock of a folder."""


class RunLock:
    """Exclusive use of ``folder`` within the context; the folder is created if it is missing.

    The operating system releases the lock when the process ends, so a killed process blocks nobody. On release the lock
    file is removed, and with it the folders that were created for it and are still empty. On a file system or a
    platform without locks, nothing is locked.

    Args:
        option: the setting that chooses another folder; named in the error message.

    Raises:
        FolderInUse: another process uses the folder.
        StorageError: it cannot be written, or a file at the path of the lock is not a lock file of psannlm.
    """

    def __init__(self, folder: Path, option: str = "train.checkpoint_dir") -> None:
        self.folder = folder
        self._option = option
        self._handle: int | None = None
        self._made: list[Path] = []
        # An existing empty file may be the user's: it is emptied again on release, and not removed.
        self._is_new = self._was_empty = False

    def __enter__(self) -> RunLock:
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            self._take()
        except StorageError:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def move_folder(self, target: Path) -> None:
        """Rename the folder, release it under its new name, and lock a new empty folder in its place."""
        with explain_write_errors(target):
            self.folder.rename(target)
        self._release(target)
        self._take()

    def _end(self) -> None:
        self._release(self.folder)
        # Folders that hold a result stay: only an empty one can be removed.
        with suppress(OSError):
            for path in self._made:
                path.rmdir()

    def _take(self) -> None:
        path = self.folder / LOCK_FILE
        with explain_write_errors(self.folder):
            while self._handle is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # race: the previous owner has just removed its empty folder
                    self._handle, self._is_new = _locked(path, self._option)
            self._was_empty = os.fstat(self._handle).st_size == 0 and not self._is_new
            os.ftruncate(self._handle, 0)
            os.lseek(self._handle, 0, os.SEEK_SET)
            os.write(self._handle, f"{os.getpid()}\n".encode())

    def _release(self, folder: Path) -> None:
        """Remove the file, then unlock: a process that opened it before sees that it is gone, and creates another."""
        if self._handle is not None:
            # The lock ends with the handle; a file that cannot be removed locks nobody out.
            with suppress(OSError):
                if self._was_empty:
                    os.ftruncate(self._handle, 0)
                elif _is_at(self._handle, folder / LOCK_FILE):
                    (folder / LOCK_FILE).unlink()
            os.close(self._handle)
            self._handle = None


def _locked(path: Path, option: str) -> tuple[int | None, bool]:
    """Return the open, locked file at ``path`` (None: it was removed meanwhile) and whether this call created it."""
    flags = os.O_RDWR | SAFE_FLAGS
    is_new = False
    try:
        handle = os.open(path, flags)
    except FileNotFoundError:
        try:
            handle, is_new = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileExistsError:
            return None, False  # another process has just created it, or it is a dangling link: the next try decides
    except OSError as error:
        # ELOOP: a symbolic link. EISDIR: a folder. ENXIO: a FIFO or socket.
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _not_a_lock(path, option) from None
        raise
    try:
        _refuse_foreign(handle, path, option)
        lock_exclusively(handle, wait=False)
        is_there = _is_at(handle, path)
    except StorageError:
        os.close(handle)
        raise
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            return handle, is_new
        holder = read_start(handle, 32).decode("ascii", "replace").strip()
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise FolderInUse(
                f"process {holder or 'unknown'} is using {path.parent}; wait for it to end, or choose another "
                f"folder with {option}"
            ) from None
        raise
    if is_there:
        return handle, is_new
    os.close(handle)
    return None, False


def _refuse_foreign(handle: int, path: Path, option: str) -> None:
    """Raise StorageError unless the open file is regular, has a single name and the content of a lock file."""
    found = os.fstat(handle)
    # A link count of 0 is accepted: the previous owner has just removed the file.
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or not _CONTENT.fullmatch(read_start(handle, 64)):
        raise _not_a_lock(path, option)


def _not_a_lock(path: Path, option: str) -> StorageError:
    return StorageError(
        f"{path} is in the way: it is not a lock file of psannlm and is not overwritten. Move or rename it, or choose "
        f"another folder with {option}."
    )


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False

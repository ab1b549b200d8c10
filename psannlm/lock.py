"""A folder to the one process that may write in it: a lock that ends with its process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from psannlm.errors import StorageError
from psannlm.storage import explain_write_errors

LOCK_FILE = ".lock"
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """Holds ``folder`` within its context: makes it where it is missing, and lets nobody else work in it.

    ``option`` is what a person sets to work in another folder; whoever is refused is told of it.
    The system forgets the lock when the process ends, so one that was killed blocks nobody. At the end the lock's file
    is removed, and with it the folders made for it that are still empty. On a file system without locks there is none.

    Raises:
        StorageError: another process works in the folder, or it cannot be written.
    """

    def __init__(self, folder: Path, option: str = "train.checkpoint_dir") -> None:
        self.folder = folder
        self._option = option
        self._handle: int | None = None
        self._made: list[Path] = []

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
        """Give the folder another name, which is free for others then, and hold a new, empty one in its place."""
        with explain_write_errors(target):
            self.folder.rename(target)
        self._let_go(target)
        self._take()

    def _end(self) -> None:
        self._let_go(self.folder)
        with suppress(OSError):
            for path in self._made:
                path.rmdir()

    def _take(self) -> None:
        path = self.folder / LOCK_FILE
        with explain_write_errors(self.folder):
            while self._handle is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # the folder of a run that just ended without a word in it
                    self._handle = _locked(path, self._option)
            os.ftruncate(self._handle, 0)
            os.write(self._handle, f"{os.getpid()}\n".encode())

    def _let_go(self, folder: Path) -> None:
        """Remove the file first: whoever opened it before finds that it is gone, and makes another."""
        if self._handle is not None:
            with suppress(OSError):
                if _is_at(self._handle, folder / LOCK_FILE):
                    (folder / LOCK_FILE).unlink()
            os.close(self._handle)
            self._handle = None


def _locked(path: Path, option: str) -> int | None:
    """Return the open, locked file at ``path``, or None when it was removed meanwhile."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = _is_at(handle, path)
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            return handle
        holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip()
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise StorageError(
                f"process {holder or 'unknown'} is at work in {path.parent}; wait for it to end, or choose another "
                f"folder with {option}"
            ) from None
        raise
    if is_there:
        return handle
    os.close(handle)
    return None


def _is_at(handle: int, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(handle), path.stat())

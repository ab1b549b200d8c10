"""A key-value store in a folder that the processes of one machine share: no port, and nothing that reads pickles.

The methods are those of torch's stores that ranks use to tell each other how they are. A key is a file, so a store that
is written to every second does not grow; torch's own FileStore appends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

_LOCK = ".lock"


class FolderStore:
    """The keys that begin with ``prefix`` in ``folder``, which must be there; who may enter it decides who may write.

    Every method raises RuntimeError, as torch's stores do, when the folder is gone or cannot be used.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder, self._prefix = folder, prefix

    def set(self, key: str, value: str) -> None:
        """Let ``key`` have ``value``; readers see the former value or this one, never half of it."""
        with _as_runtime_error():
            self._write(self._path(key), value.encode("utf-8"))

    def get(self, key: str) -> bytes:
        """Return the value of ``key``, which must have one."""
        with _as_runtime_error():
            return self._path(key).read_bytes()

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """Return the values of ``keys``, all of which must have one."""
        return [self.get(key) for key in keys]

    def check(self, keys: Sequence[str]) -> bool:
        """Return whether all of ``keys`` have a value."""
        with _as_runtime_error():
            # Where the folder itself is gone no key will ever come.
            self._folder.stat()
            return all(self._path(key).exists() for key in keys)

    def add(self, key: str, amount: int) -> int:
        """Add ``amount`` to the number at ``key``, which counts from 0, and return the sum."""
        with _as_runtime_error(), self._alone():
            path = self._path(key)
            value = amount + (int(path.read_bytes()) if path.exists() else 0)
            self._write(path, str(value).encode("ascii"))
            return value

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes:
        """Let ``key`` have ``desired_value`` if it has ``expected_value`` (``""``: none); return what it has."""
        with _as_runtime_error(), self._alone():
            path = self._path(key)
            value = path.read_bytes() if path.exists() else b""
            if value == expected_value.encode("utf-8"):
                value = desired_value.encode("utf-8")
                self._write(path, value)
            return value

    def _path(self, key: str) -> Path:
        return self._folder / quote(f"{self._prefix}/{key}", safe="")

    def _write(self, path: Path, value: bytes) -> None:
        try:
            handle = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            handle = -1
        if handle >= 0:
            try:
                # In place where it fits: a sign of life must not fail because the disk has filled up meanwhile.
                if os.fstat(handle).st_size == len(value):
                    os.pwrite(handle, value, 0)
                    return
            finally:
                os.close(handle)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_bytes(value)
        beside.replace(path)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        handle = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


@contextmanager
def _as_runtime_error() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RuntimeError(f"the folder where ranks meet cannot be used: {error}") from error

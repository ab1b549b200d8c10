"""Key-value store in a folder shared by the processes of one machine: no port, no pickle.

It has the methods of torch's stores that the rank watchdog uses. Each key is a file, so that a store does not grow when
it is written every second; torch's FileStore appends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from psannlm.io.platform_files import lock_exclusively

_LOCK = ".lock"


class FolderStore:
    """Keys with ``prefix`` in an existing ``folder``, whose permissions control access.

    Every method raises RuntimeError, as torch's stores do, if the folder was removed or cannot be used.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder, self._prefix = folder, prefix

    def set(self, key: str, value: str) -> None:
        """Set ``key`` to ``value`` atomically: readers see the old or the new value."""
        with _as_runtime_error():
            self._write(self._path(key), value.encode("utf-8"))

    def get(self, key: str) -> bytes:
        """Return the value of ``key``, which must exist."""
        with _as_runtime_error():
            return self._path(key).read_bytes()

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """Return the values of ``keys``, all of which must exist."""
        return [self.get(key) for key in keys]

    def check(self, keys: Sequence[str]) -> bool:
        """Return whether all of ``keys`` exist."""
        with _as_runtime_error():
            # Raise if the folder was removed: then no key will ever exist.
            self._folder.stat()
            return all(self._path(key).exists() for key in keys)

    def add(self, key: str, amount: int) -> int:
        """Add ``amount`` to the number at ``key`` (0 if missing) and return the sum."""
        with _as_runtime_error(), self._locked():
            path = self._path(key)
            value = amount + (int(path.read_bytes()) if path.exists() else 0)
            self._write(path, str(value).encode("ascii"))
            return value

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes:
        """Set ``key`` to ``desired_value`` if it is ``expected_value`` (``""``: missing); return its value then."""
        with _as_runtime_error(), self._locked():
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
                # Overwrite a value of the same size in place: a heartbeat must not fail because the disk is full.
                if os.fstat(handle).st_size == len(value):
                    os.write(handle, value)  # the position is 0: it has just been opened
                    return
            finally:
                os.close(handle)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_bytes(value)
        beside.replace(path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not lock_exclusively(handle, wait=True):
                raise RuntimeError("this platform has no file locks, which ranks on one machine need")
            yield
        finally:
            os.close(handle)


@contextmanager
def _as_runtime_error() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RuntimeError(f"the folder of the key-value store cannot be used: {error}") from error

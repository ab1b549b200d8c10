"""Folder at a URL, read and written through fsspec, with errors of one line.

An object store shows an object only when all of it is stored. A file is therefore whole or missing, as a local file is
that was renamed into its place.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from psannlm.errors import CorpusError, PsannlmError, install_extra
from psannlm.io.urls import file_system, protocol_of

_PACKAGES = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "hf": "huggingface_hub",
}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials",
    "gs": "gcloud auth application-default login",
    "gcs": "gcloud auth application-default login",
    "hf": "hf auth login",
}
_READ_ONLY = ("http", "https")
# Base classes of the errors of client libraries that are neither OSError nor RuntimeError; looked up only where the
# library is loaded.
_CLIENT_ERRORS = (
    ("asyncio", "TimeoutError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("azure.core.exceptions", "AzureError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
)
_REFUSED = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError")
_NAMES_REFUSED = (*_REFUSED, "ClientAuthenticationError", "TokenRetrievalError", "RefreshError")


def remote_errors() -> tuple[type[Exception], ...]:
    """Return the classes of errors that fsspec and the client libraries loaded so far raise."""
    loaded = ((sys.modules.get(module), name) for module, name in _CLIENT_ERRORS)
    clients = tuple(getattr(module, name) for module, name in loaded if hasattr(module, name))
    return (OSError, ValueError, ImportError, RuntimeError, *clients)


@contextmanager
def explain_remote_errors(url: str, kind: type[PsannlmError], action: str = "read") -> Iterator[None]:
    """Turn errors of fsspec and its libraries about a URL into a ``kind`` of one line with cause and remedy.

    ``action``: what fails, as a participle: ``read`` or ``written``.
    """
    try:
        yield
    except remote_errors() as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise kind(f"{url}: cannot be {action}: {reason}; {_remedy(url, error, action)}") from error


def _remedy(url: str, error: Exception, action: str) -> str:
    protocol = protocol_of(url) or ""
    if isinstance(error, ImportError):
        if (error.name or "").partition(".")[0] == "fsspec":
            return install_extra("data")
        return f"{protocol}:// takes the package {_PACKAGES.get(protocol, 'of its protocol')}: install it with pip"
    if isinstance(error, PermissionError) or type(error).__name__ in _NAMES_REFUSED:
        where = f" ({_CREDENTIALS[protocol]})" if protocol in _CREDENTIALS else ""
        return f"check the credentials{where}, and that they may {'read' if action == 'read' else 'write'} there"
    if isinstance(error, FileNotFoundError):
        return "check the spelling" if action == "read" else "create the bucket, or check the spelling"
    may = "read" if action == "read" else "write"
    return f"check the URL and the network, and that you may {may} it"


class RemoteFolder:
    """The files directly in the folder at ``url``. A bucket is never created.

    Args:
        kind: class of the errors that methods raise: one line with URL, cause and remedy.
        is_output: the folder will be written to.

    Raises:
        kind: the protocol needs a package that is missing, or cannot be written.
        CorpusError: the protocol is not one of ``urls.PROTOCOLS``.
    """

    def __init__(self, url: str, kind: type[PsannlmError] = CorpusError, *, is_output: bool = False) -> None:
        self.url = url.rstrip("/")
        self._kind = kind
        if is_output and (protocol := protocol_of(url)) in _READ_ONLY:
            raise kind(f"{url}: {protocol}:// can be read and not written; name a folder, or a URL such as s3://")
        with self._explained("read"):
            self._system, path = file_system(self.url)
        self._path = str(path).rstrip("/")

    @property
    def reads_in_parallel(self) -> bool:
        """Whether :meth:`read` may be called in several threads at once."""
        return bool(getattr(self._system, "async_impl", False))

    def url_of(self, name: str) -> str:
        """Return the URL of a file of the folder."""
        return f"{self.url}/{name}"

    def names(self) -> set[str]:
        """Return the names of the files and folders in the folder; none if it does not exist."""
        with self._explained("read"):
            # Listings are cached for the life of a process, and others may write there.
            self._system.invalidate_cache()
            try:
                found = self._system.ls(self._path, detail=False)
            except FileNotFoundError:
                return set()
        return {str(name).rstrip("/").rpartition("/")[2] for name in found}

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, or None if it is missing or a folder."""
        with self._explained("read", name):
            self._system.invalidate_cache()
            try:
                found = self._system.info(self._at(name))
            except (FileNotFoundError, NotADirectoryError):
                return None
            if found.get("type") == "directory":
                return None
            if not isinstance(found.get("size"), int):
                raise ValueError("its size is unknown")
        return int(found["size"])

    def modified_s(self, name: str) -> float:
        """Return when a file was last written, in seconds since 1970; 0 if the protocol does not report it."""
        with self._explained("read", name):
            try:
                return float(self._system.modified(self._at(name)).timestamp())
            except NotImplementedError:
                return 0.0

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes | None:
        """Return the bytes of a file from ``start`` to ``end`` (exclusive), all by default; None if it is missing."""
        with self._explained("read", name):
            try:
                return bytes(self._system.cat_file(self._at(name), start=start, end=end))
            except FileNotFoundError:
                return None

    def put(self, path: Path, name: str) -> None:
        """Copy a local file to the folder."""
        with self._explained("written", name):
            self._system.put_file(str(path), self._at(name))

    def put_bytes(self, name: str, content: bytes) -> None:
        """Write ``content`` to a file of the folder."""
        with self._explained("written", name):
            self._system.pipe_file(self._at(name), content)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with self._explained("written", name):
            try:
                self._system.rm_file(self._at(name))
            except FileNotFoundError:
                return

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _explained(self, action: str, name: str = "") -> AbstractContextManager[None]:
        return explain_remote_errors(self.url_of(name) if name else self.url, self._kind, action)

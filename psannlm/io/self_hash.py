"""SHA-256 that a safetensors file records of itself, and hashing of a file in a thread before its result is needed.

Nothing here imports torch, so that a command can hash a model file while torch is loaded, which takes longer.
"""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

from psannlm.errors import ArtifactError
from psannlm.io.limits import HASHED_FIRST_BYTES
from psannlm.io.safetensors_header import read_header

HASH_KEY = "sha256"
# The digits while the hash is computed.
BLANK = "0" * 64
# The interpreter lock is taken once for each chunk, for which a thread beside an import waits some milliseconds.
_CHUNK_BYTES = 8 << 20


def hash_position(path: Path, header: bytes) -> int:
    """Return where in the file the 64 digits of its hash begin. Raises ArtifactError if its header has none."""
    marker = f'"{HASH_KEY}":"'.encode("ascii")
    at = header.find(marker)
    if at < 0 or at + len(marker) + len(BLANK) > len(header):
        raise ArtifactError(f"{path} has an incomplete {HASH_KEY}: it is damaged or not a psannlm file")
    return at + len(marker)


def hash_with_blank(path: Path, at: int) -> str:
    """Return the SHA-256 of a file whose digits at ``at`` count as zeros, from :func:`hash_ahead` where that has it.

    Raises:
        OSError: the file cannot be read.
    """
    ahead = _ahead.pop(os.path.abspath(path), None)
    if ahead is not None:
        ahead.thread.join()
        if ahead.at == at and ahead.signature == _signature(os.stat(path)):
            return ahead.digest
    with open(path, "rb") as file:
        return _hash_file(file.fileno(), at)


@dataclass
class _Ahead:
    """A hash in the making: valid for a file that is as ``signature`` says and has its digits at ``at``."""

    thread: threading.Thread = field(default_factory=threading.Thread)
    signature: tuple[int, ...] = ()
    at: int = -1
    digest: str = ""


_ahead: dict[str, _Ahead] = {}


def hash_ahead(path: Path) -> None:
    """Begin to hash a file in a thread; the next check of the file waits for it instead of hashing.

    Nothing happens for what is not a file, and for a file so large that its header is checked before it is hashed.
    A file that changes meanwhile is hashed again, and what is wrong with one is left to that check to report.
    """
    if not path.is_file() or path.stat().st_size > HASHED_FIRST_BYTES:
        return
    ahead = _Ahead()

    def run() -> None:
        try:
            with open(path, "rb") as file:
                before = os.fstat(file.fileno())
                at = hash_position(path, read_header(path, file, before.st_size))
                ahead.digest = _hash_file(file.fileno(), at)
                if _signature(os.fstat(file.fileno())) == _signature(before):
                    ahead.signature, ahead.at = _signature(before), at
        except (OSError, ArtifactError):
            return

    # A daemon: a command that ends for another reason does not wait for it.
    ahead.thread = threading.Thread(target=run, daemon=True)
    _ahead[os.path.abspath(path)] = ahead
    ahead.thread.start()


def _signature(entry: os.stat_result) -> tuple[int, ...]:
    return entry.st_dev, entry.st_ino, entry.st_size, entry.st_mtime_ns, entry.st_ctime_ns


def _hash_file(descriptor: int, at: int) -> str:
    digest = hashlib.sha256()
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        file.seek(0)
        digest.update(file.read(at))
        digest.update(BLANK.encode("ascii"))
        file.seek(at + len(BLANK))
        chunk = bytearray(_CHUNK_BYTES)
        view = memoryview(chunk)
        while n_bytes := file.readinto(chunk):
            digest.update(view[:n_bytes])
    return digest.hexdigest()

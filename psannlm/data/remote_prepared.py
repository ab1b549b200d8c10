"""Prepared folders at URLs: their manifests, and copies of their files on local disk, checked by hash.

A copy lies in a folder of the cache that is named by the hash of the manifest, so that a folder that was prepared again
gets another copy, and a copy in use never changes. A file has its name only once all of its blocks were checked: a copy
that was killed resumes with the files that are missing.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from psannlm.config.files import MANIFEST_FILE, MANIFEST_MARK, PLAN_FILE, WORK_FOLDER, may_be_prepared
from psannlm.data.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from psannlm.data.shard_file import ShardEntry, is_shard_at, open_shard
from psannlm.errors import ArtifactError, CorpusError, StorageError
from psannlm.io.atomic import (
    explain_write_errors,
    free_bytes,
    is_plain_file,
    remove_leftovers,
    replacing,
    sha256_file,
    write_bytes,
)
from psannlm.io.cache import CACHE_VARIABLE, cache_folder, cache_name
from psannlm.io.hub import pinned
from psannlm.io.limits import MAX_TOKENIZER_BYTES
from psannlm.io.lock import FolderInUse, RunLock
from psannlm.io.remote_folder import RemoteFolder, explain_remote_errors
from psannlm.runtime.progress import OnProgress, Progress, ProgressCounter

log = logging.getLogger(__name__)

SPLITS = ("train", "validation")
CACHE_KEY = "data.cache_dir"
# Enough for each request to be short beside its transfer; as many at once hide the latency of an object store.
_RANGE_BYTES = 16 << 20
_AT_ONCE = 8
_WAIT_S = 0.2
_HEAD_BYTES = 4096


@dataclass(frozen=True)
class RemotePrepared:
    """A prepared folder at a URL, and its manifest as it is now; ``content``: the bytes of ``manifest.json``."""

    folder: RemoteFolder
    content: bytes
    manifest: Manifest

    @property
    def url(self) -> str:
        """URL of the folder."""
        return self.folder.url

    def copy_folder(self, cache_dir: str | Path | None) -> Path:
        """Return the folder of the copy, in ``cache_dir`` or, where None, in the user's cache; it need not exist."""
        parent = cache_folder() if cache_dir is None else Path(cache_dir).expanduser()
        return parent / "prepared" / cache_name(self.url, self.content)


def find_remote_prepared(path: str) -> RemotePrepared | None:
    """Return the prepared folder at a URL of the folder or of its manifest; None for anything else, such as text.

    Raises:
        CorpusError: the URL cannot be read: a package is missing, or access is refused.
        ArtifactError: the manifest is damaged or of another version, or the preparation is unfinished.
    """
    if not may_be_prepared(path):
        return None
    with explain_remote_errors(path, CorpusError):
        url = pinned(path).rstrip("/").removesuffix(f"/{MANIFEST_FILE}")
    folder = RemoteFolder(url)
    size = folder.size(MANIFEST_FILE)
    if size is None:
        if folder.size(f"{WORK_FOLDER}/{PLAN_FILE}") is not None:
            raise ArtifactError(
                f"{url} holds unfinished work of psannlm prep and no {MANIFEST_FILE}; run psannlm prep again"
            )
        return None
    if size > MAX_MANIFEST_BYTES:
        return None
    content = folder.read(MANIFEST_FILE)
    if content is None or MANIFEST_MARK.encode() not in content[:_HEAD_BYTES]:
        return None
    return RemotePrepared(folder, content, parse_manifest(content, folder.url_of(MANIFEST_FILE)))


def copy_files(
    source: RemotePrepared, splits: Sequence[str], cache_dir: str | Path | None, on_progress: OnProgress
) -> Path:
    """Copy the tokenizer and the shards of ``splits`` to local disk, and return their folder.

    Files that are there and whole are not copied again. Of several processes on one machine one copies, and the others
    wait. The copy gets its manifest when it has both splits.

    Raises:
        ArtifactError: a file is missing or damaged at the URL, or was replaced while it was copied.
        CorpusError: the URL cannot be read.
        StorageError: the disk is too small, or the folder cannot be written.
    """
    folder = source.copy_folder(cache_dir)
    names = _wanted(source, splits)
    if not _missing(source, folder, names):
        log.info(f"{source.url}: copied before, to {folder}")
        _keep_manifest(source, folder)
        return folder
    with _locked(source, folder, on_progress):
        with explain_write_errors(folder):
            remove_leftovers(folder)
        missing = _missing(source, folder, names)
        _refuse_small_disk(source, folder, missing)
        if missing:
            _copy(source, folder, missing, on_progress)
        _keep_manifest(source, folder)
    return folder


def _wanted(source: RemotePrepared, splits: Sequence[str]) -> dict[str, ShardEntry | None]:
    """Return the names of the files to copy, each with its entry in the manifest; None for the tokenizer."""
    shards = {entry.file: entry for split in splits for entry in getattr(source.manifest, split).shards}
    return {source.manifest.tokenizer.file: None, **shards}


def _missing(source: RemotePrepared, folder: Path, names: dict[str, ShardEntry | None]) -> dict[str, ShardEntry | None]:
    def is_whole(name: str, entry: ShardEntry | None) -> bool:
        path = folder / name
        if entry is not None:
            return is_shard_at(path, entry)
        return is_plain_file(path) and sha256_file(path) == source.manifest.tokenizer.fingerprint

    return {name: entry for name, entry in names.items() if not is_whole(name, entry)}


def _refuse_small_disk(source: RemotePrepared, folder: Path, missing: dict[str, ShardEntry | None]) -> None:
    needed = sum(entry.file_bytes for entry in missing.values() if entry is not None)
    free = free_bytes(folder)
    if needed > free:
        raise StorageError(
            f"a copy of {source.url} needs {needed / 1e6:,.1f} MB more in {folder}, and {free / 1e6:,.1f} MB are free; "
            f"free some space, or choose another disk with {CACHE_KEY} or ${CACHE_VARIABLE}"
        )


@contextmanager
def _locked(source: RemotePrepared, folder: Path, on_progress: OnProgress) -> Iterator[None]:
    """Hold the lock of the copy; meanwhile report what another process, which holds it, has copied."""
    lock = RunLock(folder, CACHE_KEY)
    total = sum(entry.file_bytes for split in SPLITS for entry in getattr(source.manifest, split).shards)
    while True:
        try:
            lock.__enter__()
            break
        except FolderInUse:
            done = 0
            with suppress(OSError):  # the other process renames files meanwhile
                done = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
            on_progress(Progress(f"waiting for another process, which copies {source.url}", done, total, "bytes"))
            time.sleep(_WAIT_S)
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _copy(source: RemotePrepared, folder: Path, missing: dict[str, ShardEntry | None], on_progress: OnProgress) -> None:
    total = sum(entry.file_bytes for entry in missing.values() if entry is not None)
    log.info(f"{source.url}: copying {len(missing):,} files, {total / 1e6:,.1f} MB, to {folder}")
    count = ProgressCounter(on_progress, f"copying {source.url}", "bytes", total)
    pool = ThreadPoolExecutor(_AT_ONCE if source.folder.reads_in_parallel else 1)
    try:
        for name, entry in missing.items():
            try:
                if entry is None:
                    _copy_tokenizer(source, folder / name)
                else:
                    _copy_shard(source, folder / name, entry, pool, count)
            except (ArtifactError, CorpusError) as error:
                _explain_change(source, error)
                raise
    finally:
        pool.shutdown(cancel_futures=True)


def _copy_tokenizer(source: RemotePrepared, path: Path) -> None:
    size = source.folder.size(path.name)
    content = None if size is None or size > MAX_TOKENIZER_BYTES else source.folder.read(path.name)
    if content is None or hashlib.sha256(content).hexdigest() != source.manifest.tokenizer.fingerprint:
        raise _damage(source, path.name, "is missing, or is not the tokenizer that the manifest names")
    write_bytes(path, content)


def _copy_shard(
    source: RemotePrepared, path: Path, entry: ShardEntry, pool: ThreadPoolExecutor, count: ProgressCounter
) -> None:
    made_with = source.manifest.tokenizer
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            for content in _ranges(source, entry, pool):
                file.write(content)
                count.add(len(content))
        try:
            open_shard(temporary, entry, made_with.fingerprint, made_with.vocab_size).verify()
        except ArtifactError as error:
            raise _damage(source, path.name, "is not the shard that the manifest names") from error


def _ranges(source: RemotePrepared, entry: ShardEntry, pool: ThreadPoolExecutor) -> Iterator[bytes]:
    """Yield the bytes of a shard in order, while the next ranges are read."""
    starts = range(0, entry.file_bytes, _RANGE_BYTES)
    read = partial(source.folder.read, entry.file)
    pending = deque(
        pool.submit(read, start, min(start + _RANGE_BYTES, entry.file_bytes)) for start in starts[:_AT_ONCE]
    )
    for start in [*starts[_AT_ONCE:], *[None] * len(pending)]:
        content = pending.popleft().result()
        if content is None:
            raise _damage(source, entry.file, "is missing, but listed in the manifest")
        if start is not None:
            pending.append(pool.submit(read, start, min(start + _RANGE_BYTES, entry.file_bytes)))
        yield content


def _explain_change(source: RemotePrepared, error: Exception) -> None:
    """Raise ArtifactError if a file could not be copied because the folder was prepared again meanwhile."""
    now: bytes | None = source.content
    with suppress(CorpusError):  # the first error says more
        now = source.folder.read(MANIFEST_FILE)
    if now != source.content:
        raise ArtifactError(
            f"{source.url} changed while it was copied: its {MANIFEST_FILE} was replaced or removed. Run the command "
            "again, once psannlm prep no longer writes there."
        ) from error


def _damage(source: RemotePrepared, name: str, problem: str) -> ArtifactError:
    return ArtifactError(f"{source.folder.url_of(name)} {problem}. Restore it from a copy, or run psannlm prep again.")


def _keep_manifest(source: RemotePrepared, folder: Path) -> None:
    """Write the manifest of a copy that has all files, so that its folder can be used as a prepared folder."""
    path = folder / MANIFEST_FILE
    if not is_plain_file(path) and not _missing(source, folder, _wanted(source, SPLITS)):
        write_bytes(path, source.content)

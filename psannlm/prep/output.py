"""Where a preparation is written: a folder of this machine, or a URL.

For a URL, files are written to a local folder of the cache first. A shard is copied to the URL as soon as it is
written, checked there, and removed here; the manifest is written last. Unfinished work at a URL is marked by a copy of
its plan, so that it may be resumed, from another machine too, and is not taken for shards of something else.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from psannlm.config.files import MANIFEST_FILE, MANIFEST_MARK, PLAN_FILE, WORK_FOLDER
from psannlm.data.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    manifest_text,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from psannlm.data.shard_file import ShardEntry, begins_as_shard, is_shard_of
from psannlm.errors import ArtifactError, ConfigError, PsannlmError, StorageError
from psannlm.io.atomic import explain_write_errors, write_bytes
from psannlm.io.cache import cache_folder, cache_name
from psannlm.io.filenames import utf8
from psannlm.io.limits import MAX_TOKENIZER_BYTES
from psannlm.io.remote_folder import RemoteFolder
from psannlm.io.urls import is_remote, local_path, protocol_of, refusal
from psannlm.prep.folder import is_own_shard, remove_work
from psannlm.prep.job import STDIN
from psannlm.prep.plan import Plan, check_finished, damage_of, differences, remove_finished

log = logging.getLogger(__name__)

_PLAN = f"{WORK_FOLDER}/{PLAN_FILE}"
_HEAD_BYTES = 2048
_LOOKS_AT_ONCE = 8


class Output:
    """A folder of this machine, into which files are written directly.

    Attributes:
        folder: where files are written.
        name: the folder as the user named it.
        n_copies: how often the tokens are on the disk of ``folder`` at once: in encoded chunks, and in shards.
        disk_advice: remedy if that disk is too small.
    """

    n_copies = 2
    disk_advice = "choose another --out"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name: Path | str = folder

    def has_manifest(self) -> bool:
        """Return whether the folder is finished."""
        return (self.folder / MANIFEST_FILE).is_file()

    def finished(self, plan: Plan) -> Manifest | None:
        """Return the manifest if the folder is finished and whole; prepare a damaged one for being written again.

        Raises:
            ConfigError: it was prepared by another plan.
            ArtifactError: it is damaged, and its corpus came from standard input, or its manifest is damaged.
        """
        if not self.has_manifest():
            return None
        manifest = read_manifest(self.folder)
        check_finished(self.folder, manifest, (self.folder / MANIFEST_FILE).stat().st_mtime, plan)
        damage = damage_of(self.folder)
        if damage is None:
            return manifest
        self._refuse_stdin(plan, damage)
        log.warning(f"{damage} Preparing it again.")
        remove_finished(self.folder, manifest)
        return None

    def begin(self, plan: Mapping[str, Any], tokenizer_file: str, tokenizer: bytes) -> None:
        """Check that nothing foreign would be overwritten outside ``folder``; ``plan``: the plan as JSON values."""

    def keep(self, entry: ShardEntry) -> None:
        """Put the shard of ``entry``, which was written to ``folder``, into its place."""

    def finish(self, manifest: Manifest, tokenizer: bytes) -> None:
        """Write the tokenizer, and the manifest last: it says that everything else is there."""
        write_bytes(self.folder / manifest.tokenizer.file, tokenizer)
        write_manifest(self.folder, manifest)

    def close(self) -> None:
        """Remove what is left in ``folder`` of a finished preparation that belongs elsewhere."""

    def _refuse_stdin(self, plan: Plan, damage: PsannlmError) -> None:
        if any(source.path == STDIN for source in plan.sources):
            # Standard input may hold another text now, which could not be noticed.
            raise ArtifactError(f"{damage} To prepare standard input again, remove {self.name} first.")


class RemoteOutput(Output):
    """A URL, and the local folder in which its files are made.

    Args:
        cache_dir: folder for unfinished work; None is the user's cache.
    """

    n_copies = 1
    disk_advice = "choose another disk with --cache-dir"

    def __init__(self, url: str, cache_dir: Path | None) -> None:
        self._remote = RemoteFolder(url, StorageError, is_output=True)
        url = self._remote.url
        super().__init__((cache_dir or cache_folder()) / "prep" / cache_name(url, utf8(url)))
        self.name = url

    def has_manifest(self) -> bool:
        """Return whether the URL holds a manifest."""
        return self._remote.size(MANIFEST_FILE) is not None

    def finished(self, plan: Plan) -> Manifest | None:
        """Return the manifest as :meth:`Output.finished`; sizes, headers and block sums of shards are checked.

        Raises:
            StorageError: a manifest.json of something else is there, or the URL cannot be read.
        """
        manifest = self._read_manifest()
        if manifest is None:
            return None
        check_finished(self.name, manifest, self._remote.modified_s(MANIFEST_FILE), plan)
        damage = self._damage(manifest)
        if damage is None:
            self._remote.remove(_PLAN)
            return manifest
        self._refuse_stdin(plan, damage)
        log.warning(f"{damage} Preparing it again.")
        # The plan first: without it, the shards would count as foreign files. Then the manifest, which they contradict.
        self._put_plan(_without_times(plan.as_dict()))
        self._remote.remove(MANIFEST_FILE)
        return None

    def begin(self, plan: Mapping[str, Any], tokenizer_file: str, tokenizer: bytes) -> None:
        """Check that no foreign file would be overwritten at the URL, and mark it as unfinished work of ``plan``.

        Raises:
            ConfigError: unfinished work of another plan is there; names every difference.
            StorageError: a foreign file is there, the bucket is missing, or access is refused.
        """
        plan = _without_times(plan)
        former = self._former_plan()
        if former is not None and (changed := differences(former, plan)):
            raise ConfigError(
                f"{self.name} holds unfinished work of another plan:\n  "
                + "\n  ".join(changed)
                + f"\nResume with the same command, choose another --out, or remove {self._remote.url_of(_PLAN)} and "
                "the shards there."
            )
        for name in sorted(self._remote.names()):
            if name == tokenizer_file:
                is_ours = self._remote.read(name) == tokenizer
            else:
                is_ours = not name.endswith(".safetensors") or (former is not None and self._is_own_shard(name))
            if not is_ours:
                raise self._in_the_way(name)
        if former is None:
            self._put_plan(plan)

    def keep(self, entry: ShardEntry) -> None:
        """Copy a shard to the URL unless it is there, check it there, and remove it here.

        Raises:
            StorageError: it cannot be written, or something else is there afterwards.
        """
        if not self._is_there(entry):
            self._remote.put(self.folder / entry.file, entry.file)
            if not self._is_there(entry):
                raise StorageError(
                    f"{self._remote.url_of(entry.file)}: differs from what was written; is another process writing "
                    "there? Run the same command to resume"
                )
        with explain_write_errors(self.folder):
            (self.folder / entry.file).unlink()

    def finish(self, manifest: Manifest, tokenizer: bytes) -> None:
        """Write the tokenizer and then the manifest to the URL, and remove the mark of unfinished work."""
        self._remote.put_bytes(manifest.tokenizer.file, tokenizer)
        self._remote.put_bytes(MANIFEST_FILE, utf8(manifest_text(manifest)))
        self._remote.remove(_PLAN)

    def close(self) -> None:
        """Remove the local folder."""
        remove_work(self.folder / WORK_FOLDER)
        for path in self.folder.glob("*.safetensors"):
            if is_own_shard(path):  # of a process that was killed after copying it
                path.unlink()

    def _read_manifest(self) -> Manifest | None:
        size = self._remote.size(MANIFEST_FILE)
        if size is None:
            return None
        content = self._remote.read(MANIFEST_FILE) if size <= MAX_MANIFEST_BYTES else None
        if content is None or MANIFEST_MARK.encode() not in content:
            raise self._in_the_way(MANIFEST_FILE)
        return parse_manifest(content, self._remote.url_of(MANIFEST_FILE))

    def _former_plan(self) -> dict[str, Any] | None:
        content = self._remote.read(_PLAN)
        if content is None:
            return None
        try:
            plan = json.loads(content)
        except (ValueError, RecursionError):
            plan = None
        if not isinstance(plan, dict) or not {"settings", "sources", "tokenizer_fingerprint"} <= plan.keys():
            raise self._in_the_way(_PLAN)
        return plan

    def _put_plan(self, plan: Mapping[str, Any]) -> None:
        self._remote.put_bytes(_PLAN, utf8(json.dumps(plan, indent=1) + "\n"))

    def _damage(self, manifest: Manifest) -> ArtifactError | None:
        made_with = manifest.tokenizer
        if (self._remote.size(made_with.file) or 0) <= MAX_TOKENIZER_BYTES:
            content = self._remote.read(made_with.file) or b""
            if hashlib.sha256(content).hexdigest() != made_with.fingerprint:
                return ArtifactError(f"{self._remote.url_of(made_with.file)} is missing or damaged.")
        entries = [*manifest.train.shards, *manifest.validation.shards]
        with ThreadPoolExecutor(_LOOKS_AT_ONCE if self._remote.reads_in_parallel else 1) as pool:
            for entry, is_there in zip(entries, pool.map(self._is_there, entries), strict=True):
                if not is_there:
                    return ArtifactError(f"{self._remote.url_of(entry.file)} is missing or damaged.")
        return None

    def _is_there(self, entry: ShardEntry) -> bool:
        size = self._remote.size(entry.file)
        return size is not None and is_shard_of(
            entry, size, lambda start, end: self._remote.read(entry.file, start, end) or b""
        )

    def _is_own_shard(self, name: str) -> bool:
        size = self._remote.size(name)
        if size is None or size == 0:
            return False
        return begins_as_shard(self._remote.read(name, 0, min(size, _HEAD_BYTES)) or b"")

    def _in_the_way(self, name: str) -> StorageError:
        return StorageError(
            f"{self._remote.url_of(name)} is in the way: psannlm did not write it, so it stays as it is. Move or "
            "rename it, or choose another URL with --out."
        )


def _without_times(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plan without the times of its files, which differ on another machine; shards are compared by hash."""
    sources = [{key: value for key, value in source.items() if key != "stamp"} for source in plan["sources"]]
    return {**plan, "sources": sources}


def open_output(out: Path | str, cache_dir: Path | None = None) -> Output:
    """Return the output of a folder, or of a URL given as text; ``file:`` URLs are folders.

    Raises:
        ConfigError: the protocol of the URL is not known.
        StorageError: it cannot be written, or a package is missing.
    """
    if isinstance(out, Path) or protocol_of(out) is None:
        return Output(Path(out))
    if problem := refusal(out):
        raise ConfigError(f"--out {problem}")
    if is_remote(out):
        return RemoteOutput(out, cache_dir)
    named = local_path(out)
    if named is None:
        raise ConfigError(f"--out {out}: names another machine; write file:///path, or the path alone")
    return Output(Path(named))

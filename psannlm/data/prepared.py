"""Prepared folders of ``psannlm prep``: finding, opening and checking them against a configuration."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from psannlm.config.data import DataConfig, PathSource, Source
from psannlm.config.files import prepared_manifest
from psannlm.data.corpus.documents import ReadReport
from psannlm.data.manifest import Manifest, SplitEntry, TokenizerEntry, read_manifest
from psannlm.data.remote_prepared import SPLITS, RemotePrepared, copy_files, find_remote_prepared
from psannlm.data.shard_file import RESTORE_ADVICE, open_shard
from psannlm.data.sharded_store import ShardedTokens
from psannlm.errors import ArtifactError, ConfigError, Problem, TokenizerError
from psannlm.runtime.progress import OnProgress, ignore_progress
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import load_tokenizer


@dataclass(frozen=True)
class PreparedFolder:
    """An open prepared folder. ``path``: the folder or its URL; ``splits``: those that were opened, by name."""

    path: Path | str
    manifest: Manifest
    tokenizer: Tokenizer
    splits: Mapping[str, ShardedTokens]

    @property
    def train(self) -> ShardedTokens:
        """The training split, which must have been opened."""
        return self.splits["train"]

    @property
    def validation(self) -> ShardedTokens | None:
        """The validation split; None if nothing is held out."""
        return self.splits.get("validation")

    @property
    def held_out(self) -> ShardedTokens:
        """What :meth:`PreparedSource.open_held_out` opened: the validation split, or all where nothing is held out."""
        return self.splits["train"] if self.validation is None else self.validation

    def report(self) -> ReadReport:
        """Return the read report of the corpus, from the manifest."""
        manifest = self.manifest
        drops = Counter({reason: n for reason, n in manifest.drops.items() if n})
        if manifest.duplicates:
            drops["duplicate"] = manifest.duplicates
        return ReadReport(
            files=len(manifest.sources),
            documents=manifest.train.documents + manifest.validation.documents,
            bytes=manifest.train.text_bytes + manifest.validation.text_bytes,
            drops=drops,
            examples={reason: [f"see {self.path}"] for reason in drops},
            known_sha256=manifest.content_sha256,
        )


@dataclass(frozen=True)
class PreparedSource:
    """A prepared folder that is named as a source: ``place`` is its manifest, or what was found at its URL."""

    place: Path | RemotePrepared

    def read_manifest(self) -> Manifest:
        """Return the manifest; nothing is copied. Raises ArtifactError if it is damaged."""
        return read_manifest(self.place) if isinstance(self.place, Path) else self.place.manifest

    def open(self, cache_dir: str | None = None, on_progress: OnProgress = ignore_progress) -> PreparedFolder:
        """Open both splits; files at a URL are copied first, to ``cache_dir`` as of ``data.cache_dir``.

        Raises:
            ArtifactError: the manifest, the tokenizer or a shard is missing, damaged, or does not match the manifest.
            CorpusError: a URL cannot be read.
            StorageError: the disk is too small for a copy, or cannot be written.
        """
        return self._open(SPLITS, cache_dir, on_progress)

    def open_held_out(self, cache_dir: str | None = None, on_progress: OnProgress = ignore_progress) -> PreparedFolder:
        """Open the validation split alone, or the training split where nothing is held out; raises as :meth:`open`."""
        split = "validation" if self.read_manifest().validation.documents else "train"
        return self._open((split,), cache_dir, on_progress)

    def _open(self, splits: Sequence[str], cache_dir: str | None, on_progress: OnProgress) -> PreparedFolder:
        if isinstance(self.place, Path):
            return open_folder(self.place, splits)
        source = self.place
        folder = copy_files(source, splits, cache_dir, on_progress)
        advice = f"Remove the file, and it is copied again from {source.url}"
        return _opened(folder, source.url, source.manifest, splits, advice)


def find_prepared(sources: Sequence[Source]) -> PreparedSource | None:
    """Return the prepared folder in ``sources``, or None if all are sources of text.

    Raises:
        ConfigError: a prepared folder is configured with other sources, or with settings that apply only to text.
        CorpusError: a URL, which may be that of a prepared folder, cannot be read.
        ArtifactError: the manifest at a URL is damaged, or of an unfinished preparation.
    """
    found = [
        (index, source, place)
        for index, source in enumerate(sources)
        if isinstance(source, PathSource)
        and (place := prepared_manifest(source.path) or find_remote_prepared(source.path)) is not None
    ]
    if not found:
        return None
    index, source, place = found[0]
    if len(found) > 1:
        raise ConfigError(
            Problem(
                "data.sources",
                f"{source.path} and {found[1][1].path} are two prepared folders, and a run reads only one; join parts "
                "of one corpus with psannlm prep --merge, or prepare all of the text as one folder",
            )
        )
    if len(sources) > 1:
        raise ConfigError(
            Problem(
                "data.sources",
                f"{source.path} is a prepared folder beside other sources; configure it alone, or prepare all of the "
                "text as one folder with psannlm prep",
            )
        )
    for key in ("per_line", "text_key"):
        if getattr(source, key) != PathSource.model_fields[key].default:
            message = f"{source.path} is a prepared folder: {key} was decided by psannlm prep; leave it out here"
            raise ConfigError(Problem(f"data.sources[{index}].{key}", message))
    return PreparedSource(place)


def open_folder(manifest_path: Path, splits: Sequence[str] = SPLITS) -> PreparedFolder:
    """Open the folder of a manifest: load the tokenizer, map the shards of ``splits`` and check their headers.

    Raises:
        ArtifactError: the manifest, the tokenizer or a shard is missing, damaged, or does not match the manifest.
    """
    manifest = read_manifest(manifest_path)
    folder = Path(manifest_path).parent
    return _opened(folder, folder, manifest, splits)


def _opened(
    folder: Path, path: Path | str, manifest: Manifest, splits: Sequence[str], advice: str = RESTORE_ADVICE
) -> PreparedFolder:
    tokenizer = _load_tokenizer(folder / manifest.tokenizer.file, manifest.tokenizer)
    opened = {
        split: _open_split(folder, manifest, getattr(manifest, split), advice)
        for split in splits
        if split == "train" or manifest.validation.documents
    }
    return PreparedFolder(path, manifest, tokenizer, opened)


def check_compatible(config: DataConfig, folder: PreparedFolder) -> None:
    """Raise ConfigError, which lists every problem, if a configuration does not match a prepared folder."""
    made = folder.manifest.tokenizer
    problems = []
    if config.tokenizer not in ("auto", made.backend):
        message = (
            f"{config.tokenizer} is configured, but {folder.path} was prepared with {made.backend}; leave it at auto"
        )
        problems.append(Problem("data.tokenizer", message))
    if config.tokenizer_model_path is not None:
        given = load_tokenizer(Path(os.path.expanduser(config.tokenizer_model_path))).fingerprint
        if given != made.fingerprint:
            message = (
                f"{config.tokenizer_model_path} has fingerprint {given}, but {folder.path} was prepared with "
                f"{made.fingerprint}; leave the path out, or prepare the text again with psannlm prep --tokenizer"
            )
            problems.append(Problem("data.tokenizer_model_path", message))
    if config.val_split:
        held_out = folder.manifest.validation.documents
        noun = "document" if held_out == 1 else "documents"
        message = (
            f"{config.val_split:g} is configured, but {folder.path} has {held_out:,} {noun} held out already; "
            "set it to 0 to validate on those"
            if held_out
            else f"{config.val_split:g} is configured, but {folder.path} was prepared with nothing held out; set it to "
            f"0, or prepare the text again with psannlm prep --val-split {config.val_split:g}"
        )
        problems.append(Problem("data.val_split", message))
    if problems:
        raise ConfigError(problems)


def _load_tokenizer(path: Path, entry: TokenizerEntry) -> Tokenizer:
    try:
        tokenizer = load_tokenizer(path)
    except TokenizerError as error:
        raise ArtifactError(f"the tokenizer of a prepared folder cannot be used: {error}") from error
    if tokenizer.fingerprint != entry.fingerprint:
        raise ArtifactError(
            f"{path} is not the tokenizer that this folder was prepared with: its fingerprint is "
            f"{tokenizer.fingerprint}, the manifest's {entry.fingerprint}. Restore the former file."
        )
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id"):
        if getattr(tokenizer, name) != getattr(entry, name):
            raise ArtifactError(
                f"{path} has {name} {getattr(tokenizer, name)} as this version reads it, the manifest has "
                f"{getattr(entry, name)}; prepare the text again with psannlm prep"
            )
    return tokenizer


def _open_split(folder: Path, manifest: Manifest, split: SplitEntry, advice: str) -> ShardedTokens:
    made_with = manifest.tokenizer
    shards = [
        open_shard(folder / entry.file, entry, made_with.fingerprint, made_with.vocab_size, advice)
        for entry in split.shards
    ]
    for shard in shards:
        if shard.dtype.name != manifest.dtype:
            raise ArtifactError(f"{shard.path} holds {shard.dtype.name}, the manifest has {manifest.dtype}")
    return ShardedTokens(shards, [source.path for source in manifest.sources])

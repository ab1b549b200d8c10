"""Prepared folders of ``psannlm prep``: finding, opening and checking them against a configuration."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from psannlm.config.data import DataConfig, PathSource, Source
from psannlm.config.files import prepared_manifest
from psannlm.data.corpus.documents import ReadReport
from psannlm.data.manifest import Manifest, SplitEntry, TokenizerEntry, read_manifest
from psannlm.data.shard_file import open_shard
from psannlm.data.sharded_store import ShardedTokens
from psannlm.errors import ArtifactError, ConfigError, Problem, TokenizerError
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import load_tokenizer


@dataclass(frozen=True)
class PreparedFolder:
    """An open prepared folder; ``validation`` is None if nothing is held out."""

    path: Path
    manifest: Manifest
    tokenizer: Tokenizer
    train: ShardedTokens
    validation: ShardedTokens | None

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


def find_prepared(sources: Sequence[Source]) -> Path | None:
    """Return the manifest of the prepared folder in ``sources``, or None if all are sources of text.

    Raises:
        ConfigError: a prepared folder is configured with other sources, or with settings that apply only to text.
    """
    found = [
        (index, source, manifest)
        for index, source in enumerate(sources)
        if isinstance(source, PathSource) and (manifest := prepared_manifest(source.path)) is not None
    ]
    if not found:
        return None
    index, source, manifest = found[0]
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
    return manifest


def open_folder(manifest_path: Path) -> PreparedFolder:
    """Open the folder of a manifest: load the tokenizer, map the shards and check their headers.

    Raises:
        ArtifactError: the manifest, the tokenizer or a shard is missing, damaged, or does not match the manifest.
    """
    manifest = read_manifest(manifest_path)
    folder = Path(manifest_path).parent
    tokenizer = _load_tokenizer(folder / manifest.tokenizer.file, manifest.tokenizer)
    train = _open_split(folder, manifest, manifest.train)
    validation = _open_split(folder, manifest, manifest.validation) if manifest.validation.documents else None
    return PreparedFolder(folder, manifest, tokenizer, train, validation)


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


def _open_split(folder: Path, manifest: Manifest, split: SplitEntry) -> ShardedTokens:
    made_with = manifest.tokenizer
    shards = [
        open_shard(folder / entry.file, entry, made_with.fingerprint, made_with.vocab_size) for entry in split.shards
    ]
    for shard in shards:
        if shard.dtype.name != manifest.dtype:
            raise ArtifactError(f"{shard.path} holds {shard.dtype.name}, the manifest has {manifest.dtype}")
    return ShardedTokens(shards, [source.path for source in manifest.sources])

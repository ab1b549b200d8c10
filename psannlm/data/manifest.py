"""What a prepared folder holds, written to its ``manifest.json`` and read back strictly.

A folder is ``manifest.json``, the tokenizer's file, and the shards of both parts. The manifest is what vouches for the
others: it holds the tokenizer's fingerprint and a hash of each shard.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from psannlm.config import files
from psannlm.data.shard_file import TOKEN_TYPES, ShardEntry
from psannlm.errors import ArtifactError
from psannlm.io.atomic import write_text
from psannlm.io.lfs_pointers import refuse_pointer
from psannlm.io.limits import MAX_PARTS

MANIFEST_FILE = files.MANIFEST_FILE
FORMAT = f"{files.MANIFEST_MARK}1"
_MAX_BYTES = 256 << 20
# Keys that folders of earlier versions lack.
_ADDED_LATER = {"lost_fraction"}
_PART = re.compile(r"([0-9]{1,9})/([0-9]{1,9})", re.ASCII)
_CONTENT_KEY, _OWN_KEY = "content_sha256", "manifest_sha256"
_T = TypeVar("_T")


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer that made the tokens; ``file`` stands in the folder."""

    file: str
    backend: str
    vocab_size: int
    fingerprint: str
    bos_id: int
    eos_id: int
    pad_id: int


@dataclass(frozen=True)
class PrepSettings:
    """How the folder was asked for; lengths are counted in characters, None is no bound."""

    val_split: float
    seed: int
    min_characters: int | None
    max_characters: int | None
    dedupe: bool
    text_key: str
    per_line: bool
    errors: str
    shard_tokens: int


@dataclass(frozen=True)
class SourceEntry:
    """One source as it was read: ``bytes`` and ``sha256`` are those of the file, ``documents`` those that were kept."""

    path: str
    bytes: int
    sha256: str
    documents: int


@dataclass(frozen=True)
class SplitEntry:
    """The training or the validation part: its sums, and its shards in order. ``tokens`` counts the framed stream."""

    documents: int
    tokens: int
    text_bytes: int
    shards: tuple[ShardEntry, ...]

    @classmethod
    def of(cls, shards: tuple[ShardEntry, ...]) -> SplitEntry:
        """Return the entry that these shards come to."""
        return cls(
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            text_bytes=sum(shard.text_bytes for shard in shards),
            shards=shards,
        )


@dataclass(frozen=True)
class Manifest:
    """Everything that is said of a prepared folder.

    ``dtype`` is uint16 or uint32; ``part`` is ``i/n``, ``1/1`` for a whole corpus; ``drops`` counts by reason what was
    left out, ``duplicates`` texts that had been seen before; ``val_overlap`` as in ``prepare.PreparedData``.
    ``lost_fraction`` is the fraction of the checked bytes of text that the tokenizer did not give back: 0 is lossless,
    None is unknown, as in folders of earlier versions.
    """

    tokenizer: TokenizerEntry
    dtype: str
    settings: PrepSettings
    part: str
    sources: tuple[SourceEntry, ...]
    train: SplitEntry
    validation: SplitEntry
    drops: dict[str, int]
    duplicates: int
    val_overlap: float | None = None
    lost_fraction: float | None = None

    @property
    def content_sha256(self) -> str:
        """A hash of all that decides the tokens of both parts and their order: the identity of the data."""
        decides = {"tokenizer": _plain(self.tokenizer), "dtype": self.dtype}
        for name, split in (("train", self.train), ("validation", self.validation)):
            decides[name] = [shard.header_and_sums_sha256 for shard in split.shards]
        del decides["tokenizer"]["file"]
        return _digest({"format": FORMAT, **decides})


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write ``manifest.json`` atomically and return its path; equal manifests give equal bytes.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    fields = {"format": FORMAT, **_plain(manifest), _CONTENT_KEY: manifest.content_sha256}
    path = Path(folder) / MANIFEST_FILE
    write_text(path, json.dumps({**fields, _OWN_KEY: _digest(fields)}, indent=1, ensure_ascii=False) + "\n")
    return path


def read_manifest(path: Path) -> Manifest:
    """Read a manifest: ``path`` is the folder, or the file in it.

    Raises:
        ArtifactError: it is missing, damaged, of another format, lacks a key or has one of the wrong type (which is
            named), names a file outside its folder, or contradicts itself.
    """
    path = Path(path)
    path = path / MANIFEST_FILE if path.is_dir() else path
    fields = _read_fields(path)
    found = fields.pop("format", None)
    if found != FORMAT:
        raise ArtifactError(f"{path} is no manifest of this version: its format is {found!r:.80}, not {FORMAT!r}")
    content, own = fields.pop(_CONTENT_KEY, None), fields.pop(_OWN_KEY, None)
    manifest: Manifest = _build(path, "", Manifest, fields)
    _refuse_contradiction(path, manifest)
    if content != manifest.content_sha256 or own != _digest({"format": FORMAT, **fields, _CONTENT_KEY: content}):
        raise ArtifactError(f"{path} is damaged, or was changed by hand: it does not agree with its own hashes")
    return manifest


def _read_fields(path: Path) -> dict[str, Any]:
    refuse_pointer(path, ArtifactError)
    try:
        if path.exists() and not path.is_file():  # a FIFO would be waited on without end
            raise ArtifactError(f"{path} is not a regular file")
        if path.stat().st_size > _MAX_BYTES:
            raise ArtifactError(f"{path} is no manifest: it is larger than {_MAX_BYTES:,} bytes")
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged or no manifest: it is not JSON") from error
    if not isinstance(fields, dict):
        raise ArtifactError(f"{path} is damaged or no manifest: it is not a table")
    return fields


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(dataclasses.asdict(value)))


def _digest(fields: Mapping[str, Any]) -> str:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _build(path: Path, where: str, kind: Any, value: Any) -> Any:
    """Return ``value``, as JSON gave it, as what ``kind`` says, or raise ArtifactError naming the key."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        hints = get_type_hints(kind)
        for name in hints.keys() - value.keys() - _ADDED_LATER:
            raise ArtifactError(f"{path} lacks {_join(where, name)}")
        for name in value.keys() - hints.keys():
            raise ArtifactError(f"{path} has an unknown key {_join(where, name)!r:.80}")
        given = {name: hint for name, hint in hints.items() if name in value}
        return kind(**{name: _build(path, _join(where, name), hint, value[name]) for name, hint in given.items()})
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is types.UnionType:
        if value is None:
            return None
        return _build(path, where, arguments[0], value)
    if origin is tuple and isinstance(value, list):
        return tuple(_build(path, f"{where}[{i}]", arguments[0], item) for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {name: _build(path, _join(where, name), arguments[1], item) for name, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if origin is None and type(value) is kind and not (kind is int and value < 0):
        return value
    wanted = {int: "a whole number from 0", float: "a number", str: "text", bool: "true or false"}
    raise ArtifactError(
        f"{path}: {where} is {value!r:.60}, not {wanted.get(kind, 'a list' if origin is tuple else 'a table')}"
    )


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _refuse_contradiction(path: Path, manifest: Manifest) -> None:
    if manifest.dtype not in TOKEN_TYPES:
        raise ArtifactError(f"{path}: dtype is {manifest.dtype!r:.60}, not one of {', '.join(TOKEN_TYPES)}")
    if (place := _PART.fullmatch(manifest.part)) is None or not 1 <= int(place[1]) <= int(place[2]) <= MAX_PARTS:
        raise ArtifactError(
            f"{path}: part is {manifest.part!r:.60}, not i/n with i from 1 to n and n up to {MAX_PARTS:,}"
        )
    if manifest.lost_fraction is not None and not 0 <= manifest.lost_fraction <= 1:
        raise ArtifactError(f"{path}: lost_fraction is {manifest.lost_fraction!r:.60}, not a fraction from 0 to 1")
    names = {"tokenizer.file": manifest.tokenizer.file}
    for part, split in (("train", manifest.train), ("validation", manifest.validation)):
        names.update({f"{part}.shards[{i}].file": shard.file for i, shard in enumerate(split.shards)})
        if split != SplitEntry.of(split.shards):
            raise ArtifactError(f"{path}: {part} does not come to the sum of its shards")
    for key, name in names.items():
        if not _is_plain_name(name):
            raise ArtifactError(f"{path}: {key} is {name!r:.80}, which is not the name of a file in this folder")
    if len(set(names.values())) < len(names):
        raise ArtifactError(f"{path}: one file is named twice")


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and not any(character in name for character in "/\\:\0")

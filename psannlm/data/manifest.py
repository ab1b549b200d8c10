"""The manifest of a prepared folder: its content, written to ``manifest.json`` and validated when it is read.

A prepared folder contains ``manifest.json``, the tokenizer file, and the shards of both splits. The manifest has the
fingerprint of the tokenizer and a hash of each shard, by which they are verified.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from psannlm.config import files
from psannlm.data.shard_file import TOKEN_TYPES, Count, ShardEntry
from psannlm.errors import ArtifactError
from psannlm.io.atomic import write_text
from psannlm.io.lfs_pointers import refuse_pointer
from psannlm.io.limits import MAX_PARTS

MANIFEST_FILE = files.MANIFEST_FILE
FORMAT = f"{files.MANIFEST_MARK}1"
MAX_MANIFEST_BYTES = 256 << 20
_PART = re.compile(r"([0-9]{1,9})/([0-9]{1,9})", re.ASCII)
_CONTENT_KEY, _OWN_KEY = "content_sha256", "manifest_sha256"
# Strict like Count: pydantic would otherwise take "3" and True for numbers.
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0.0, le=1.0, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer of the tokens; ``file`` is its name in the folder."""

    __pydantic_config__ = _STRICT

    file: str
    backend: str
    vocab_size: Count
    fingerprint: str
    bos_id: Count
    eos_id: Count
    pad_id: Count


@dataclass(frozen=True)
class ManifestSettings:
    """Settings of the preparation (``prep.job.PrepSettings.for_manifest``); None is no limit."""

    __pydantic_config__ = _STRICT

    val_split: Number
    seed: Count
    min_characters: Count | None
    max_characters: Count | None
    dedupe: Flag
    text_key: str
    per_line: Flag
    errors: str
    shard_tokens: Count


@dataclass(frozen=True)
class SourceEntry:
    """One source: ``bytes`` and ``sha256`` of the file, and the number of ``documents`` kept."""

    __pydantic_config__ = _STRICT

    path: str
    bytes: Count
    sha256: str
    documents: Count


@dataclass(frozen=True)
class SplitEntry:
    """The training or the validation split: totals, and shards in order. ``tokens`` includes BOS and EOS."""

    __pydantic_config__ = _STRICT

    documents: Count
    tokens: Count
    text_bytes: Count
    shards: tuple[ShardEntry, ...]

    @classmethod
    def of(cls, shards: tuple[ShardEntry, ...]) -> SplitEntry:
        """Return the entry of these shards."""
        return cls(
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            text_bytes=sum(shard.text_bytes for shard in shards),
            shards=shards,
        )

    @property
    def predicted_tokens(self) -> int:
        """Number of tokens that a model learns to predict: those of the text and one EOS per document."""
        return self.tokens - self.documents


@dataclass(frozen=True)
class Manifest:
    """The whole manifest.

    ``part`` is ``i/n``, ``1/1`` for a whole corpus; ``drops``: omitted documents by reason; ``duplicates``: omitted
    repetitions; ``val_overlap`` as in ``prepare.PreparedData``. ``lost_fraction``: fraction of the checked bytes that
    the tokenizer does not give back; 0 is lossless, None is unknown, as in folders of earlier versions.
    """

    __pydantic_config__ = _STRICT

    tokenizer: TokenizerEntry
    dtype: Annotated[str, Field(pattern=f"^(?:{'|'.join(TOKEN_TYPES)})$")]
    settings: ManifestSettings
    part: str
    sources: tuple[SourceEntry, ...]
    train: SplitEntry
    validation: SplitEntry
    drops: dict[str, Count]
    duplicates: Count
    val_overlap: Number | None = None
    lost_fraction: Fraction | None = None

    @property
    def content_sha256(self) -> str:
        """Hash of everything that determines the tokens of both splits and their order: the identity of the data."""
        decides = {"tokenizer": _plain(self.tokenizer), "dtype": self.dtype}
        for name, split in (("train", self.train), ("validation", self.validation)):
            decides[name] = [shard.header_and_sums_sha256 for shard in split.shards]
        del decides["tokenizer"]["file"]
        return _digest({"format": FORMAT, **decides})


_MANIFEST = TypeAdapter(Manifest)


def manifest_text(manifest: Manifest) -> str:
    """Return the content of ``manifest.json``; equal manifests give equal text."""
    fields = {"format": FORMAT, **_plain(manifest), _CONTENT_KEY: manifest.content_sha256}
    return json.dumps({**fields, _OWN_KEY: _digest(fields)}, indent=1, ensure_ascii=False) + "\n"


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write ``manifest.json`` atomically and return its path.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    path = Path(folder) / MANIFEST_FILE
    write_text(path, manifest_text(manifest))
    return path


def read_manifest(path: Path) -> Manifest:
    """Read a manifest: ``path`` is the folder, or the file in it.

    Raises:
        ArtifactError: the file is missing, damaged or of another format; a key is missing, unknown or has a wrong
            value (it is named); a file is outside the folder; or the manifest contradicts itself.
    """
    path = Path(path)
    path = path / MANIFEST_FILE if path.is_dir() else path
    return parse_manifest(_read_content(path), path)


def parse_manifest(content: bytes, path: Path | str) -> Manifest:
    """Return the manifest with this content, read from ``path``, a file or a URL. Raises as :func:`read_manifest`."""
    fields = _parsed_fields(content, path)
    found = fields.pop("format", None)
    if found != FORMAT:
        raise ArtifactError(f"{path} is not a manifest of this version: its format is {found!r:.80}, not {FORMAT!r}")
    tokens, own = fields.pop(_CONTENT_KEY, None), fields.pop(_OWN_KEY, None)
    try:
        manifest = _MANIFEST.validate_python(fields)
    except ValidationError as error:
        raise ArtifactError(_explained(path, error.errors(include_url=False))) from error
    _refuse_contradiction(path, manifest)
    if tokens != manifest.content_sha256 or own != _digest({"format": FORMAT, **fields, _CONTENT_KEY: tokens}):
        raise ArtifactError(f"{path} is damaged, or was changed by hand: it does not agree with its own hashes")
    return manifest


def _read_content(path: Path) -> bytes:
    refuse_pointer(path, ArtifactError)
    try:
        if path.exists() and not path.is_file():  # reading a FIFO would block
            raise ArtifactError(f"{path} is not a regular file")
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ArtifactError(f"{path} is not a manifest: it is larger than {MAX_MANIFEST_BYTES:,} bytes")
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error


def _parsed_fields(content: bytes, path: Path | str) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged or is not a manifest: it is not JSON") from error
    if not isinstance(fields, dict):
        raise ArtifactError(f"{path} is damaged or is not a manifest: it is not a JSON object")
    return fields


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(dataclasses.asdict(value)))


def _digest(fields: Mapping[str, Any]) -> str:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# What a value of the wrong type should have been, by the type of pydantic's error.
_WANTED = {
    "int_type": "a whole number from 0",
    "float_type": "a number",
    "finite_number": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
}


def _explained(path: Path | str, errors: list[ErrorDetails]) -> str:
    """Return one line about the first error: the file, the key and the value."""
    details = errors[0]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in details["loc"]).removeprefix(".")
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "missing":
        return f"{path} lacks {key}"
    if kind == "unexpected_keyword_argument":
        return f"{path} has an unknown key {key!r:.80}"
    if kind == "string_pattern_mismatch":
        return f"{path}: {key} is {value!r:.60}, not one of {', '.join(TOKEN_TYPES)}"
    if kind in ("greater_than_equal", "less_than_equal"):
        is_fraction = any(isinstance(limit, float) for limit in context.values())
        return f"{path}: {key} is {value!r:.60}, not {'a fraction from 0 to 1' if is_fraction else _WANTED['int_type']}"
    return f"{path}: {key} is {value!r:.60}, not {_WANTED.get(kind, 'a table')}"


def _refuse_contradiction(path: Path | str, manifest: Manifest) -> None:
    if (found := _PART.fullmatch(manifest.part)) is None or not 1 <= int(found[1]) <= int(found[2]) <= MAX_PARTS:
        raise ArtifactError(
            f"{path}: part is {manifest.part!r:.60}, not i/n with i from 1 to n and n up to {MAX_PARTS:,}"
        )
    names = {"tokenizer.file": manifest.tokenizer.file}
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        names.update({f"{name}.shards[{i}].file": shard.file for i, shard in enumerate(split.shards)})
        if split != SplitEntry.of(split.shards):
            raise ArtifactError(f"{path}: {name} is not the sum of its shards")
    for key, file in names.items():
        if not _is_plain_name(file):
            raise ArtifactError(f"{path}: {key} is {file!r:.80}, which is not the name of a file in this folder")
    if len(set(names.values())) < len(names):
        raise ArtifactError(f"{path}: one file is named twice")


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and not any(character in name for character in "/\\:\0")

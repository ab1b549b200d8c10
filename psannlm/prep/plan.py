"""The plan of a preparation, stored in the work folder: resuming with another plan is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from psannlm.config.files import PLAN_FILE
from psannlm.data.manifest import MANIFEST_FILE, Manifest, TokenizerEntry
from psannlm.data.prepared import open_folder
from psannlm.errors import ArtifactError, ConfigError
from psannlm.io.atomic import explain_write_errors, refuse_foreign, sha256_file, write_text
from psannlm.io.urls import is_remote
from psannlm.prep.folder import is_own_shard, remove_files
from psannlm.prep.job import STDIN, PrepSettings
from psannlm.prep.reader import Cut, SourceFile
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import file_suffix

_VERSION = 3
_SHOWN = 5


@dataclass(frozen=True)
class Plan:
    """Everything that determines the bytes of a prepared folder. ``part``: (index from 1, number of parts) or None."""

    sources: tuple[SourceFile, ...]
    settings: PrepSettings
    fingerprint: str
    part: tuple[int, int] | None
    chunk_bytes: int
    cut: Cut | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "version": _VERSION,
            "settings": self.settings.as_dict(),
            "tokenizer_fingerprint": self.fingerprint,
            "part": None if self.part is None else list(self.part),
            "chunk_bytes": self.chunk_bytes,
            "cut": None if self.cut is None else vars(self.cut),
            "sources": [source.as_dict() for source in self.sources],
        }

    def with_cut(self, cut: Cut) -> Plan:
        """Return the plan for a corpus that is a single document."""
        return replace(self, cut=cut)


def write_plan(work: Path, plan: Plan) -> None:
    """Write a plan. Raises StorageError if it cannot be written."""
    write_text(work / PLAN_FILE, json.dumps(plan.as_dict(), indent=1) + "\n")


def write_merge_plan(work: Path, manifest: Manifest) -> None:
    """Write the plan of a merge of parts like ``manifest``, which marks the work folder as psannlm's.

    Raises:
        StorageError: it cannot be written.
    """
    write_text(work / PLAN_FILE, json.dumps(merge_plan(manifest), indent=1) + "\n")


def merge_plan(manifest: Manifest) -> dict[str, Any]:
    """Return the plan of a merge of parts like ``manifest`` as JSON values."""
    return {
        "version": _VERSION,
        "merge": manifest.part.split("/")[1],
        "settings": vars(manifest.settings),
        "tokenizer_fingerprint": manifest.tokenizer.fingerprint,
        "sources": [{"path": source.path, "bytes": source.bytes} for source in manifest.sources],
    }


def is_merge(work: Path) -> bool:
    """Return whether the work folder belongs to a merge."""
    try:
        return "merge" in json.loads((work / PLAN_FILE).read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def resume_plan(work: Path, plan: Plan) -> Plan | None:
    """Return the plan to resume: ``plan`` with the cut of the unfinished work; None if there is no unfinished work.

    Raises:
        ConfigError: the unfinished work belongs to another plan; names every difference.
        ArtifactError: the recorded plan is damaged.
    """
    path = work / PLAN_FILE
    if not path.is_file():
        return None
    try:
        former = json.loads(path.read_bytes())
        cut = Cut(**former["cut"]) if former["cut"] and former["version"] == _VERSION else None
        changed = differences(former, plan.as_dict())
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); remove {work} to start from scratch") from error
    if changed:
        raise ConfigError(
            f"{work.parent} holds unfinished work of another plan:\n  "
            + "\n  ".join(changed)
            + f"\nResume with the same command, choose another --out, or remove {work} to start from scratch."
        )
    return plan.with_cut(cut) if cut is not None else plan


def differences(former: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences of two plans as lines of text; ``chunk_bytes`` is ignored, it follows from the sources."""
    lines = []
    for name in ("version", "tokenizer_fingerprint", "part"):
        if name in former and name in now and former[name] != now[name]:
            lines.append(f"{name.replace('_', ' ')}: {_shown(former[name])} then, {_shown(now[name])} now")
    then, settings = former["settings"], now["settings"]
    for name in sorted({*then, *settings}):
        if then.get(name) != settings.get(name):
            lines.append(f"--{name.replace('_', '-')}: {then.get(name)} then, {settings.get(name)} now")
    return lines + source_differences(former["sources"], now["sources"])


def source_differences(former: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the files of a corpus that are missing, new or changed, as lines of text."""
    before, after = ({source["path"]: source for source in sources} for sources in (former, now))
    lines = [f"{path}: no longer part of the corpus" for path in before if path not in after]
    lines += [f"{path}: not part of the corpus then" for path in after if path not in before]
    for path, source in after.items():
        if path in before:
            then = before[path]
            if then["bytes"] != source["bytes"]:
                lines.append(f"{path}: {then['bytes']:,} bytes then, {source['bytes']:,} bytes now")
            elif then.get("stamp") != source.get("stamp"):
                lines.append(f"{path}: written to since")
    if not lines and list(before) != list(after):
        lines.append("the order of the files changed")
    if len(lines) > _SHOWN:
        lines[_SHOWN:] = [f"and {len(lines) - _SHOWN:,} files more"]
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(map(str, value))
    return f"{value:.12}" if isinstance(value, str) else str(value)


def tokenizer_entry(tokenizer: Tokenizer) -> TokenizerEntry:
    """Return the manifest entry of a tokenizer, with its file name in the prepared folder."""
    return TokenizerEntry(
        file="tokenizer" + file_suffix(tokenizer.backend),
        backend=tokenizer.backend,
        vocab_size=tokenizer.vocab_size,
        fingerprint=tokenizer.fingerprint,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )


def check_finished(out: Path | str, manifest: Manifest, made_s: float, plan: Plan) -> None:
    """Check that the finished folder or URL ``out`` was prepared by ``plan``.

    A source modified after the manifest, ``made_s`` seconds since 1970, is hashed again; the others are compared by
    size.

    Raises:
        ConfigError: the folder was made with other settings, tokenizer or corpus; names every difference.
    """
    changed = []
    if manifest.tokenizer.fingerprint != plan.fingerprint:
        changed.append(f"tokenizer: {manifest.tokenizer.fingerprint:.12} then, {plan.fingerprint:.12} now")
    part = "1/1" if plan.part is None else f"{plan.part[0]}/{plan.part[1]}"
    if manifest.part != part:
        changed.append(f"part: {manifest.part} then, {part} now")
    then, now = vars(manifest.settings), vars(plan.settings.for_manifest())
    changed += [f"{name}: {then[name]} then, {now[name]} now" for name in now if then[name] != now[name]]
    former = [vars(source) for source in manifest.sources if source.path != STDIN]
    sources = [{"path": each.path, "bytes": each.n_bytes} for each in plan.sources if each.path != STDIN]
    changed += source_differences(former, sources)
    if not changed:
        for source in manifest.sources:
            is_newer = source.path != STDIN and not is_remote(source.path) and os.stat(source.path).st_mtime > made_s
            if source.sha256 and is_newer and sha256_file(Path(source.path)) != source.sha256:
                changed.append(f"{source.path}: its content changed")
    if changed:
        raise ConfigError(
            f"{out} was prepared with other settings:\n  "
            + "\n  ".join(changed)
            + "\nUse the former settings, or choose another folder with --out."
        )


def damage_of(out: Path) -> ArtifactError | None:
    """Check every byte of a finished folder; return the first error, or None."""
    try:
        folder = open_folder(out / MANIFEST_FILE)
        for split in (folder.train, folder.validation):
            for shard in () if split is None else split.segments:
                shard.verify()
    except ArtifactError as error:
        return error
    return None


def remove_finished(out: Path, manifest: Manifest) -> None:
    """Remove the files named in the manifest of a finished folder, and the manifest last: it proves who wrote them.

    Raises:
        StorageError: psannlm did not write one of the files; nothing has been removed.
    """
    sizes = {entry.file: entry.file_bytes for split in (manifest.train, manifest.validation) for entry in split.shards}

    def is_ours(path: Path) -> bool:
        if path.name not in sizes:
            return path.stat().st_size == 0 or sha256_file(path) == manifest.tokenizer.fingerprint
        # A shard with a damaged header still has the size in the manifest.
        return is_own_shard(path) or path.stat().st_size in (0, sizes[path.name])

    refuse_foreign(out / MANIFEST_FILE, lambda path: True, "or choose another folder with --out")
    remove_files(out, [manifest.tokenizer.file, *sizes], is_ours)
    with explain_write_errors(out):
        (out / MANIFEST_FILE).unlink(missing_ok=True)

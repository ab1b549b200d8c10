"""A folder that was prepared before: the same command finds its work done, and any other is refused."""

from __future__ import annotations

import os
from pathlib import Path

from psannlm.data.files import is_remote
from psannlm.data.manifest import MANIFEST_FILE, Manifest, TokenizerEntry, read_manifest
from psannlm.data.prepared import open_folder
from psannlm.errors import ArtifactError, ConfigError
from psannlm.io.atomic import explain_write_errors, refuse_foreign, sha256_file
from psannlm.prep.folder import is_own_shard, remove_files
from psannlm.prep.plan import Plan, source_differences
from psannlm.prep.settings import STDIN
from psannlm.tokenizers.base import Tokenizer

_SUFFIXES = {"sentencepiece": ".model"}


def tokenizer_entry(tokenizer: Tokenizer) -> TokenizerEntry:
    """Return what a manifest says of a tokenizer, under the file name it has in the folder."""
    return TokenizerEntry(
        file="tokenizer" + _SUFFIXES.get(tokenizer.backend, ".json"),
        backend=tokenizer.backend,
        vocab_size=tokenizer.vocab_size,
        fingerprint=tokenizer.fingerprint,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )


def refuse_other(out: Path, plan: Plan) -> Manifest:
    """Return the manifest of a finished folder if ``plan`` is what it was made by.

    A file that was written to after the manifest is hashed again; the others are known by their size.

    Raises:
        ConfigError: the folder was made with other settings, another tokenizer or another corpus; names what differs.
        ArtifactError: the manifest is damaged.
    """
    manifest = read_manifest(out)
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
        made = (out / MANIFEST_FILE).stat().st_mtime
        for source in manifest.sources:
            is_newer = source.path != STDIN and not is_remote(source.path) and os.stat(source.path).st_mtime > made
            if source.sha256 and is_newer and sha256_file(Path(source.path)) != source.sha256:
                changed.append(f"{source.path}: its content changed")
    if changed:
        raise ConfigError(
            f"{out} was prepared in another way:\n  "
            + "\n  ".join(changed)
            + "\nGive the former settings, or choose another folder with --out."
        )
    return manifest


def damage_of(out: Path) -> ArtifactError | None:
    """Return what is missing or damaged of a finished folder, every byte of its shards checked, or None."""
    try:
        folder = open_folder(out / MANIFEST_FILE)
        for split in (folder.train, folder.validation):
            for shard in () if split is None else split.segments:
                shard.verify()
    except ArtifactError as error:
        return error
    return None


def remove_finished(out: Path, manifest: Manifest) -> None:
    """Remove what the manifest of a finished folder names, and last the manifest, which proves that it is ours.

    Raises:
        StorageError: a file is not what psannlm wrote there; then none has been removed.
    """
    sizes = {entry.file: entry.file_bytes for split in (manifest.train, manifest.validation) for entry in split.shards}

    def is_ours(path: Path) -> bool:
        if path.name not in sizes:
            return path.stat().st_size == 0 or sha256_file(path) == manifest.tokenizer.fingerprint
        # A shard that is damaged in its header still has the size that the manifest records.
        return is_own_shard(path) or path.stat().st_size in (0, sizes[path.name])

    refuse_foreign(out / MANIFEST_FILE, lambda path: True, "or choose another folder with --out")
    remove_files(out, [manifest.tokenizer.file, *sizes], is_ours)
    with explain_write_errors(out):
        (out / MANIFEST_FILE).unlink(missing_ok=True)

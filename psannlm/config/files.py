"""The ``data`` section comes in; a finding for every file it names that does not exist goes out."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path

from psannlm.config.data import DataConfig, PathSource
from psannlm.config.validation import Finding
from psannlm.config.yaml_loader import nearest_sibling
from psannlm.io.lfs_pointers import pointer_at
from psannlm.io.urls import literal_beginning, local_path, protocol_of, refusal

MANIFEST_FILE = "manifest.json"
MANIFEST_MARK = "psannlm-shards-"
# Where psannlm prep works until a folder is finished.
WORK_FOLDER, PLAN_FILE = ".work", "plan.json"
_SHARDS = "train_*.safetensors"
_HEAD_BYTES = 4096
_MISSING_SHOWN = 3
# What reading a manifest may meet; what is wrong with it is said when it is opened.
_NOT_READ = (OSError, ValueError, KeyError, TypeError, RecursionError)


def prepared_manifest(path: str | Path) -> Path | None:
    """Return the manifest that ``path`` leads to: that of a folder that psannlm prep made, or itself; else None.

    A folder of text may hold a ``manifest.json`` of another tool: only one that begins as ours does, or that stands
    beside shards, is taken for one.
    """
    whole = Path(os.path.expanduser(path))
    manifest = whole / MANIFEST_FILE if _is_folder(whole) else whole
    if manifest.name != MANIFEST_FILE or not _is_file(manifest):
        return None
    return manifest if is_own_manifest(manifest) or any(manifest.parent.glob(_SHARDS)) else None


def is_own_manifest(path: Path) -> bool:
    """Tell whether a file begins as the manifests of psannlm prep do."""
    try:
        with open(path, "rb") as file:
            return MANIFEST_MARK.encode() in file.read(_HEAD_BYTES)
    except OSError:
        return False


def is_prepared(source: PathSource) -> bool:
    """Tell whether a source is a prepared folder."""
    return prepared_manifest(source.path) is not None


def holds_out(source: PathSource) -> bool:
    """Tell whether a prepared folder has a validation part; one whose manifest cannot be read may have."""
    manifest = prepared_manifest(source.path)
    try:
        return manifest is None or bool(json.loads(manifest.read_bytes())["validation"]["documents"])
    except _NOT_READ:
        return True


def missing_files(data: DataConfig) -> Iterator[Finding]:
    """Yield a finding for each source that leads to no file, and for a tokenizer file that is not there."""
    for index, source in enumerate(data.sources):
        if isinstance(source, PathSource) and (message := _missing_source(source.path) or _missing_part(source.path)):
            yield Finding(("data", "sources", index, "path"), message)
    tokenizer = data.tokenizer_model_path
    if tokenizer is not None and not _is_file(Path(os.path.expanduser(tokenizer))):
        remedy = "; write null to fit one on the corpus" if tokenizer.lower() in ("none", "no", "auto", "off") else ""
        problem = pointer_at(os.path.expanduser(tokenizer))
        message = f"{tokenizer!r} is {problem}" if problem else _missing(tokenizer, "file") + remedy
        yield Finding(("data", "tokenizer_model_path"), message)


def _missing_source(path: str) -> str | None:
    expanded = os.path.expanduser(path)
    if _exists(Path(expanded)):
        return None
    if problem := pointer_at(expanded):
        return f"{path!r} is {problem}"
    protocol = protocol_of(path)
    if protocol is not None:
        if problem := refusal(path):
            return problem
        if protocol != "file":
            return None  # looked up when it is read
        named = local_path(path)
        if named is None:
            return f"{path!r} names another machine; write file:///path, or the path alone"
        if _exists(Path(named)):
            return None
        expanded = named
    if glob.has_magic(expanded):
        # One match is enough; a pattern over a large folder is not walked to its end.
        matches = any(True for _ in glob.iglob(literal_beginning(expanded)[1], recursive=True))
        return None if matches else f"no file matches {path!r} (looked from {Path.cwd()})"
    return _missing(path if protocol is None else expanded, "file or folder")


def _missing_part(path: str) -> str | None:
    """Return what a prepared folder lacks, looking at names alone; whether the rest is sound is told on opening it."""
    manifest = prepared_manifest(path)
    if manifest is None:
        folder = Path(os.path.expanduser(path))
        if _is_folder(folder):
            held = "shards" if any(folder.glob(_SHARDS)) else "the work of psannlm prep"
            if held == "shards" or _is_file(folder / WORK_FOLDER / PLAN_FILE):
                return f"{path!r} holds {held} and no {MANIFEST_FILE}: it was not finished; run psannlm prep again"
        return None
    try:
        fields = json.loads(manifest.read_bytes())
        names = [fields["tokenizer"]["file"]]
        names += [shard["file"] for part in ("train", "validation") for shard in fields[part]["shards"]]
        missing = [name for name in names if not _is_file(manifest.parent / name)]
    except _NOT_READ:
        return None
    if not missing:
        return None
    more = f" and {len(missing) - _MISSING_SHOWN} more" if len(missing) > _MISSING_SHOWN else ""
    shown = ", ".join(missing[:_MISSING_SHOWN])
    return f"{path!r} lacks {shown}{more}, which its {MANIFEST_FILE} names; bring it back, or run psannlm prep again"


def _missing(text: str, kind: str) -> str:
    whole = path = Path(os.path.expanduser(text))
    if not path.is_absolute():
        start = f", looked for in {Path.cwd()}"
    else:
        start = ""
    while not _exists(path.parent):
        path = path.parent
    if path == whole:
        return f"{text!r} is no {kind}{nearest_sibling(path)}{start}"
    return f"{text!r} is no {kind}: {str(path)!r} does not exist{nearest_sibling(path)}{start}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # A name the system cannot even look up (too long, no permission on the way) leads to no file.
        return False


def _is_file(path: Path) -> bool:
    return _exists(path) and path.is_file()


def _is_folder(path: Path) -> bool:
    return _exists(path) and path.is_dir()

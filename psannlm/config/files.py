"""Files named in the ``data`` section: which are missing, and which folders are prepared ones."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path

from psannlm.config.data import DataConfig, PathSource
from psannlm.config.validation import ConfigIssue
from psannlm.config.yaml_loader import nearest_sibling
from psannlm.io.lfs_pointers import pointer_at
from psannlm.io.urls import is_remote, literal_beginning, local_path, protocol_of, refusal

MANIFEST_FILE = "manifest.json"
MANIFEST_MARK = "psannlm-shards-"
# Folder of unfinished work of psannlm prep, and the plan in it.
WORK_FOLDER, PLAN_FILE = ".work", "plan.json"
_SHARDS = "train_*.safetensors"
_HEAD_BYTES = 4096
_MISSING_SHOWN = 3
_TEXT_ENDINGS = (".txt", ".jsonl", ".ndjson", ".gz", ".zst", ".parquet")
# Errors of reading a manifest here; they are reported when the folder is opened.
_NOT_READ = (OSError, ValueError, KeyError, TypeError, RecursionError)


def prepared_manifest(path: str | Path) -> Path | None:
    """Return the manifest of psannlm prep at ``path``, a prepared folder or the manifest itself; else None.

    A folder of text may hold a ``manifest.json`` of another tool: a manifest counts only if it begins as those of
    psannlm do, or if shards are beside it.
    """
    named = local_path(str(path)) if protocol_of(str(path)) == "file" else None
    whole = Path(os.path.expanduser(named or path))
    manifest = whole / MANIFEST_FILE if _is_folder(whole) else whole
    if manifest.name != MANIFEST_FILE or not _is_file(manifest):
        return None
    return manifest if is_own_manifest(manifest) or any(manifest.parent.glob(_SHARDS)) else None


def may_be_prepared(path: str) -> bool:
    """Return whether a URL may name a prepared folder, or its manifest; only a look at it decides.

    Servers of web pages have no folders: there the manifest itself is to be named.
    """
    if not is_remote(path) or refusal(path) is not None:
        return False
    name = path.rstrip("/").rpartition("/")[2].lower()
    if protocol_of(path) in ("http", "https"):
        return name == MANIFEST_FILE
    return not glob.has_magic(path) and not name.endswith(_TEXT_ENDINGS)


def is_own_manifest(path: Path) -> bool:
    """Return whether a file begins as the manifests of psannlm prep do."""
    try:
        with open(path, "rb") as file:
            return MANIFEST_MARK.encode() in file.read(_HEAD_BYTES)
    except OSError:
        return False


def is_prepared(source: PathSource) -> bool:
    """Return whether a source is a prepared folder."""
    return prepared_manifest(source.path) is not None


def holds_out(source: PathSource) -> bool:
    """Return whether a prepared folder has a validation split; True if its manifest cannot be read."""
    manifest = prepared_manifest(source.path)
    try:
        return manifest is None or bool(json.loads(manifest.read_bytes())["validation"]["documents"])
    except _NOT_READ:
        return True


def missing_files(data: DataConfig) -> Iterator[ConfigIssue]:
    """Yield an issue for each source and tokenizer file that does not exist."""
    for index, source in enumerate(data.sources):
        if isinstance(source, PathSource) and (message := _missing_source(source.path) or _missing_shards(source.path)):
            yield ConfigIssue(("data", "sources", index, "path"), message)
    tokenizer = data.tokenizer_model_path
    if tokenizer is not None and not _is_file(Path(os.path.expanduser(tokenizer))):
        remedy = "; write null to fit one on the corpus" if tokenizer.lower() in ("none", "no", "auto", "off") else ""
        problem = pointer_at(os.path.expanduser(tokenizer))
        message = f"{tokenizer!r} is {problem}" if problem else _missing(tokenizer, "file") + remedy
        yield ConfigIssue(("data", "tokenizer_model_path"), message)


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
            return None  # checked when it is read
        named = local_path(path)
        if named is None:
            return f"{path!r} names another machine; write file:///path, or the path alone"
        if _exists(Path(named)):
            return None
        expanded = named
    if glob.has_magic(expanded):
        # One match is enough: a pattern over a large folder is not expanded completely.
        matches = any(True for _ in glob.iglob(literal_beginning(expanded)[1], recursive=True))
        return None if matches else f"no file matches {path!r} (looked from {Path.cwd()})"
    return _missing(path if protocol is None else expanded, "file or folder")


def _missing_shards(path: str) -> str | None:
    """Return which files of a prepared folder are missing, or None; their content is checked when it is opened."""
    manifest = prepared_manifest(path)
    if manifest is None:
        folder = Path(os.path.expanduser(path))
        if _is_folder(folder):
            held = "shards" if any(folder.glob(_SHARDS)) else "the work of psannlm prep"
            if held == "shards" or _is_file(folder / WORK_FOLDER / PLAN_FILE):
                return f"{path!r} holds {held} and no {MANIFEST_FILE}: it is unfinished; run psannlm prep again"
        return None
    try:
        fields = json.loads(manifest.read_bytes())
        names = [fields["tokenizer"]["file"]]
        names += [shard["file"] for split in ("train", "validation") for shard in fields[split]["shards"]]
        missing = [name for name in names if not _is_file(manifest.parent / name)]
    except _NOT_READ:
        return None
    if not missing:
        return None
    more = f" and {len(missing) - _MISSING_SHOWN} more" if len(missing) > _MISSING_SHOWN else ""
    shown = ", ".join(missing[:_MISSING_SHOWN])
    return f"{path!r} lacks {shown}{more}, listed in its {MANIFEST_FILE}; restore it, or run psannlm prep again"


def _missing(text: str, kind: str) -> str:
    whole = path = Path(os.path.expanduser(text))
    if not path.is_absolute():
        start = f", looked for in {Path.cwd()}"
    else:
        start = ""
    while not _exists(path.parent):
        path = path.parent
    if path == whole:
        return f"{text!r} is not a {kind}{nearest_sibling(path)}{start}"
    return f"{text!r} is not a {kind}: {str(path)!r} does not exist{nearest_sibling(path)}{start}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # Too long, or no permission on the way: the name cannot be looked up.
        return False


def _is_file(path: Path) -> bool:
    return _exists(path) and path.is_file()


def _is_folder(path: Path) -> bool:
    return _exists(path) and path.is_dir()

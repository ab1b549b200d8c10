"""The ``data`` section comes in; a finding for every file it names that does not exist goes out."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from psannlm.config.data import DataConfig, PathSource
from psannlm.config.findings import Finding
from psannlm.config.yaml_tree import nearest_sibling


def missing_files(data: DataConfig) -> Iterator[Finding]:
    """Yield a finding for each source that leads to no file, and for a tokenizer file that is not there."""
    for index, source in enumerate(data.sources):
        if isinstance(source, PathSource) and (message := _missing_source(source.path)):
            yield Finding(("data", "sources", index, "path"), message)
    tokenizer = data.tokenizer_model_path
    if tokenizer is not None and not _is_file(Path(os.path.expanduser(tokenizer))):
        yield Finding(("data", "tokenizer_model_path"), _missing(tokenizer, "file"))


def _missing_source(path: str) -> str | None:
    expanded = os.path.expanduser(path)
    if _exists(Path(expanded)):
        return None
    if glob.has_magic(path):
        # One match is enough; a pattern over a large folder is not walked to its end.
        matches = any(True for _ in glob.iglob(expanded, recursive=True))
        return None if matches else f"no file matches {path!r} (looked from {Path.cwd()})"
    return _missing(path, "file or folder")


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

"""Pointers of Git LFS and git-annex: small files and links in place of large files that were not fetched.

A clone without ``git lfs pull`` or ``git annex get`` is full of them. Their few lines are no text to train on, and no
damaged model: every reader of a user's files asks here, and says what to run.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from psannlm.errors import PsannlmError

# Maximum size of a Git LFS pointer; those of git-annex are not longer.
POINTER_BYTES = 1024
# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md; the other two are its names before the release.
_LFS = re.compile(
    rb"version (?:https://git-lfs\.github\.com/spec/|https://hawser\.github\.com/spec/|http://git-media\.io/v/)[^\n]*\n"
    rb"(?:[^\n]*\n)*?oid [a-z0-9]+:[0-9a-f]+\r?\n(?:[^\n]*\n)*?size [0-9]+\s*\Z"
)
# https://git-annex.branchable.com/internals/pointer_file: the second form is for file systems without links.
_ANNEX = re.compile(rb"(?:/annex/objects/|(?:\.\./)*\.git/annex/objects/)[^\n]+(?:\n|\Z)")
_ANNEX_LINK = "annex/objects/"


def pointer_in(content: bytes) -> str | None:
    """Return the kind of pointer that ``content`` is, with the command that fetches the file; None if it is not one."""
    if len(content) > POINTER_BYTES:
        return None
    if _LFS.match(content):
        return "a Git LFS pointer, not the file itself; run git lfs pull in its repository"
    if _ANNEX.match(content):
        return "a git-annex pointer, not the file itself; run git annex get in its repository"
    return None


def pointer_at(path: Path | str) -> str | None:
    """Return :func:`pointer_in` of the file at ``path``, or of a git-annex link whose file is missing.

    None for everything else, also for what cannot be read.
    """
    try:
        if os.path.islink(path) and not os.path.exists(path) and _ANNEX_LINK in os.readlink(path):
            return "a git-annex link whose file is not here; run git annex get in its repository"
        if not os.path.isfile(path) or os.path.getsize(path) > POINTER_BYTES:
            return None
        with open(path, "rb") as file:
            return pointer_in(file.read(POINTER_BYTES + 1))
    except (OSError, ValueError):
        return None


def refuse_pointer(path: Path | str, error: type[PsannlmError]) -> None:
    """Raise ``error``, with the path and the command to run, if :func:`pointer_at` finds a pointer."""
    if problem := pointer_at(path):
        raise error(f"{path}: {problem}")

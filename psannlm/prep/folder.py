"""Ownership of the files in a prepared folder: which were written by psannlm, by content, and may be replaced."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path

from psannlm.config.files import MANIFEST_FILE, PLAN_FILE
from psannlm.data.shard_file import FORMAT
from psannlm.errors import StorageError
from psannlm.io.atomic import explain_write_errors, is_plain_file, is_plain_folder, read_small, refuse_foreign
from psannlm.io.atomic import remove_leftovers as remove_temporaries
from psannlm.io.safetensors_header import file_metadata
from psannlm.prep.encoded_chunk import is_encoded_chunk

_PLAN_BYTES = 1 << 30
_PIECE = re.compile(r"piece_[0-9]{8,}")
_REMEDY = "or choose another folder with --out"


def is_own_shard(path: Path) -> bool:
    """Return whether the header of the file is that of a token shard of psannlm."""
    return file_metadata(path, 1 << 20).get("format") == FORMAT


def refuse_foreign_files(out: Path, tokenizer_file: str, tokenizer: bytes, *, has_work: bool) -> None:
    """Check that preparing into ``out`` overwrites no file that psannlm did not write.

    Args:
        tokenizer_file: file name of the tokenizer in ``out``; ``tokenizer``: its bytes.
        has_work: ``out`` has unfinished work of the same plan, and may have shards of it.

    Raises:
        StorageError: another file has one of these names; the message names it.
    """
    refuse_foreign(out / MANIFEST_FILE, _nothing_is_ours, _REMEDY)
    refuse_foreign(out / tokenizer_file, lambda path: path.read_bytes() == tokenizer, _REMEDY)
    for path in sorted(out.glob("*.safetensors")):
        refuse_foreign(path, is_own_shard if has_work else _nothing_is_ours, _REMEDY)


def _nothing_is_ours(path: Path) -> bool:
    return False


def refuse_foreign_work(work: Path) -> None:
    """Raise StorageError if ``.work`` is not a folder, or holds a file that is not unfinished work."""
    if not os.path.lexists(work):
        return
    if not is_plain_folder(work):
        raise StorageError(f"{work} is in the way: it is not a folder of psannlm. Move or rename it, {_REMEDY}.")
    with explain_write_errors(work):
        remove_temporaries(work)
        names = {path.name for path in work.iterdir()}
    is_ours = _is_own_plan(work / PLAN_FILE)
    for name in sorted(names):
        path = work / name
        if not is_ours or not _is_work(path):
            raise StorageError(
                f"{path} is in the way: psannlm did not write it, so it stays as it is. Move or rename it, {_REMEDY}."
            )


def remove_work(work: Path) -> None:
    """Remove unfinished work, and its folder unless another file is in it.

    Raises:
        StorageError: they cannot be removed.
    """
    if not is_plain_folder(work):
        return
    with explain_write_errors(work):
        remove_temporaries(work)
        paths = list(work.iterdir())
        if not paths or not _is_own_plan(work / PLAN_FILE):
            if not paths:
                work.rmdir()
            return
        # The plan last: without it, encoded chunks that a kill leaves behind would count as foreign files.
        for path in sorted(paths, key=lambda path: path.name == PLAN_FILE):
            if path.name != PLAN_FILE and _is_work(path):
                path.unlink()
        if [path.name for path in work.iterdir()] == [PLAN_FILE]:
            (work / PLAN_FILE).unlink()
            work.rmdir()


def _is_work(path: Path) -> bool:
    if not is_plain_file(path):
        return False
    if path.name == PLAN_FILE:
        return _is_own_plan(path)
    return _PIECE.fullmatch(path.name) is not None and is_encoded_chunk(path)


def _is_own_plan(path: Path) -> bool:
    """Return whether the file is the plan of a preparation or a merge."""
    try:
        content = json.loads(read_small(path, _PLAN_BYTES) or b"")
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"version", "settings", "tokenizer_fingerprint", "sources"} <= content.keys()


def remove_files(out: Path, names: Collection[str], is_ours: Callable[[Path], bool]) -> None:
    """Remove files of a finished folder, after checking that psannlm wrote all of them.

    Raises:
        StorageError: a file is foreign or cannot be removed; nothing has been removed.
    """
    for name in names:
        refuse_foreign(out / name, is_ours, _REMEDY)
    with explain_write_errors(out):
        for name in names:
            (out / name).unlink(missing_ok=True)

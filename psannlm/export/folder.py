"""Exported folders: checked beforehand, written under a temporary name beside their own, published by a rename."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from psannlm.errors import ConfigError, StorageError
from psannlm.io.atomic import explain_write_errors, is_plain_file, is_plain_folder, sync_file, temporary_beside

# Every file that an export writes, of any version: what --force may replace.
_OURS = re.compile(
    r"config\.json|generation_config\.json|model(-[0-9]{5}-of-[0-9]{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.json|tokenizer_config\.json|README\.md|(configuration|modeling)_psannlm\.py|[^/]*\.gguf"
)


def require_place(out: Path, *, is_forced: bool) -> None:
    """Check before the work that an export can be published at ``out``.

    Raises:
        ConfigError: ``out`` is a folder that is not empty, and not ``is_forced``.
        StorageError: ``out`` is not a folder, or holds files that no export writes.
    """
    if not os.path.lexists(out):
        return
    if not is_plain_folder(out):
        raise StorageError(f"{out} is in the way: it is not a folder. Move it, or choose another folder with --out.")
    with explain_write_errors(out):
        entries = sorted(out.iterdir())
    if not entries:
        return
    if not is_forced:
        raise ConfigError(
            f"--out: {out} is not empty; choose another folder, or replace an earlier export with --force"
        )
    foreign = [entry.name for entry in entries if not (_OURS.fullmatch(entry.name) and is_plain_file(entry))]
    if foreign:
        raise StorageError(
            f"{out} holds {foreign[0]!r}, which an export does not write, so it is not replaced. Move it, or choose "
            "another folder with --out."
        )


@contextmanager
def new_folder(out: Path, *, is_forced: bool) -> Iterator[Path]:
    """Yield an empty folder of the name of ``out`` in a temporary folder beside it; on success rename it to ``out``.

    Whatever else the caller writes beside the yielded folder is removed. An earlier export at ``out`` stays until the
    new one is complete.

    Raises:
        ConfigError, StorageError: as :func:`require_place` raises them, or the disk is full.
    """
    out = out.absolute()
    require_place(out, is_forced=is_forced)
    with explain_write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(out) as temporary:
            temporary.mkdir()
            yield temporary
            for path in temporary.iterdir():
                sync_file(path)
            sync_file(temporary)
            require_place(out, is_forced=is_forced)
            if os.path.lexists(out):
                os.replace(out, temporary.with_name(temporary.name + ".replaced"))
            os.replace(temporary, out)
            sync_file(out.parent)

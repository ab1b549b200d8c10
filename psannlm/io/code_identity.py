"""Hash of the source files that decide what a run learns, recorded in its ``system.json``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

# Key of ``system.json``: the hashes of all code that trained the run, in order; a resumed run may have several.
CODE_KEY = "code_sha256"
UNKNOWN_CODE = "unknown"
# Reports, exports and the command line change no loss, nor does what is measured after training. The configuration is
# compared by its values.
_SOURCES = (
    "data",
    "evaluation/loss.py",
    "evaluation/tasks",
    "kernels",
    "models",
    "runtime/device.py",
    "tokenizers",
    "training",
)


def code_sha256() -> str:
    """Return the SHA-256 of the names and contents of the files that decide what a run learns, comments included."""
    return sources_sha256(_SOURCES)


def package_sha256() -> str:
    """Return the SHA-256 of all source files of the package, which the ranks of one run must have in common."""
    return sources_sha256((".",))


@lru_cache(maxsize=8)
def sources_sha256(names: tuple[str, ...]) -> str:
    """Return the SHA-256 of the names and contents of source files, comments included.

    Args:
        names: packages of psannlm, of which all modules count, and modules, by their paths.
    """
    root = Path(__file__).resolve().parents[1]
    files = [
        path for name in names for path in ([root / name] if name.endswith(".py") else (root / name).rglob("*.py"))
    ]
    digest = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def code_of_run(former: Mapping[str, Any] | None) -> list[str]:
    """Return the hashes of all code that trains a run.

    Args:
        former: ``system.json`` of the run that is resumed; None for a new run.
    """
    if former is None:
        return [code_sha256()]
    found = former.get(CODE_KEY)
    codes = [str(code) for code in found] if isinstance(found, list) else [UNKNOWN_CODE]
    return codes if codes[-1:] == [code_sha256()] else [*codes, code_sha256()]

"""The user's folder for caches: copies of prepared folders at URLs, and unfinished work on them."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

CACHE_VARIABLE = "PSANNLM_CACHE_DIR"
_NAME_CHARACTERS = 40


def cache_folder() -> Path:
    """Return ``$PSANNLM_CACHE_DIR``, or ``psannlm`` in the platform's folder for caches; it need not exist."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "psannlm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "psannlm"


def cache_name(url: str, identity: bytes) -> str:
    """Return the name of a folder in the cache: the end of the URL, to be recognized, and a hash of ``identity``."""
    end = re.sub(r"[^\w.+-]+", "_", url.rstrip("/").rpartition("/")[2]).strip(".")[:_NAME_CHARACTERS]
    return f"{end or 'folder'}-{hashlib.sha256(identity).hexdigest()[:16]}"

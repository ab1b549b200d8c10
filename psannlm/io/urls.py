"""URLs and globs of corpora: the allowed protocols, without chained ones.

fsspec knows dozens of protocols, some of which run what a file says (``reference``), write copies (``filecache``) or
wrap others (``zip::https://``). A configuration of a stranger must not reach them by what it calls a file.
"""

from __future__ import annotations

import glob
import importlib
import os
import re
from typing import Any
from urllib.parse import unquote

from psannlm.errors import CorpusError

# Listed in SECURITY.md. ``file`` is read without fsspec; ``memory`` is that of this process.
PROTOCOLS = ("file", "http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory")
# At least two letters: C:/ is a drive.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)(?:://|:(?=/)|::)")
_ADDRESS = re.compile(r"https?://\[[0-9A-Fa-f:.]+\]", re.IGNORECASE)


def protocol_of(path: str) -> str | None:
    """Return the protocol, in lower case, of a URL that is not an existing path; else None.

    ``memory:/x`` and ``simplecache::x`` count, so that they are refused as what they are meant to be.
    """
    found = _URL.match(path)
    if found is None or os.path.lexists(path) or ("://" not in path and glob.has_magic(path) and glob.glob(path)):
        return None
    return found[1].lower()


def is_remote(path: str) -> bool:
    """Return whether ``path`` is a URL (``https://x``, ``s3://x``), which fsspec opens; ``file:`` names a path."""
    return protocol_of(path) not in (None, "file")


def refusal(url: str) -> str | None:
    """Return why a URL with a protocol may not be read, or None."""
    protocol = protocol_of(url)
    if protocol not in PROTOCOLS:
        known = ", ".join(f"{each}://" for each in PROTOCOLS)
        return f"{url}: URLs of the protocol '{protocol}' are not read; known are {known}. Copy it to a file first"
    if "::" in _ADDRESS.sub("", url) and not (protocol == "file" and local_path(url) is not None):
        return f"{url}: URLs that are chained with '::' are not read; copy what it names to a file first"
    if protocol != "file" and "://" not in url:
        return f"{url}: no such file or folder; a URL would begin with {protocol}://"
    return None


def local_path(url: str) -> str | None:
    """Return the path that a ``file:`` URL names, as written if that exists, else with ``%20`` decoded.

    None for a URL that names another machine, or no path.
    """
    rest = url[len("file:") :]
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host.lower() in ("", "localhost"):
            rest = slash + path
        elif os.path.lexists(rest[2:]):
            rest = rest[2:]  # file://folder/a.txt, meant as a relative path
        else:
            return None
    elif not rest.startswith("/"):
        return None
    decoded = unquote(rest)
    return decoded if decoded != rest and _exists(decoded) and not _exists(rest) else rest


def literal_beginning(path: str) -> tuple[str, str]:
    """Return (the folder in which a glob begins, the glob): brackets in names of existing folders are not a pattern.

    ``set [2013]/*.txt`` gives ``("set [2013]", "set [[]2013]/*.txt")`` where there is such a folder.
    """
    root = "/" if path.startswith("/") else ""
    names = path.split("/")
    while names and os.path.lexists(os.path.join(root, names[0])):
        root = os.path.join(root, names.pop(0))
    return root or ".", os.path.join(glob.escape(root), *names)


def _exists(path: str) -> bool:
    """Return whether a path exists, or a glob matches."""
    if os.path.lexists(path):
        return True
    return glob.has_magic(path) and next(glob.iglob(literal_beginning(path)[1], recursive=True), None) is not None


def file_system(url: str) -> tuple[Any, str]:
    """Return (file system, path in it) of a remote URL that :func:`refusal` accepts.

    fsspec's own look-up would split the URL at ``::`` and hand its parts to other protocols.

    Raises:
        CorpusError: the URL is refused.
    """
    if problem := refusal(url):
        raise CorpusError(problem)
    registry: Any = importlib.import_module("fsspec.registry")
    protocol = protocol_of(url)
    url = f"{protocol}{url[len(protocol or '') :]}"
    kind = registry.get_filesystem_class(protocol)
    return kind(**kind._get_kwargs_from_urls(url)), kind._strip_protocol(url)

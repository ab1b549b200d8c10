"""Revisions of Hugging Face Hub URLs: ``hf://datasets/OWNER/NAME@REVISION/PATH``.

A branch or tag can move between two readings of a corpus. A URL is therefore pinned to the commit that its revision
names now, before any file is listed; manifests and checkpoints record the pinned URL.
"""

from __future__ import annotations

import functools
import glob
import importlib
import logging
import re
from typing import Any
from urllib.parse import quote, unquote

log = logging.getLogger(__name__)

_URL = re.compile(
    r"hf://(?P<kind>datasets/|spaces/|models/)?(?P<id>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?"
    r"(?P<path>/.*)?",
    re.DOTALL,
)
_COMMIT = re.compile("[0-9a-f]{40}")
# Their repositories have no commits.
_UNVERSIONED = ("buckets/",)


@functools.cache
def pinned(url: str) -> str:
    """Return an ``hf://`` URL at the commit that its revision names now; log a warning if it names no revision.

    Other URLs, URLs at a commit and those whose repository is a glob are returned as they are. The access token is
    that of ``hf auth login`` or ``HF_TOKEN``.

    Raises:
        Exception: any error of ``huggingface_hub``: the repository or revision does not exist, or the Hub cannot be
            reached.
    """
    found = _URL.fullmatch(url)
    if found is None or url.startswith(tuple(f"hf://{prefix}" for prefix in _UNVERSIONED)):
        return url
    kind, repository, revision, path = found["kind"] or "", found["id"], found["revision"], found["path"] or ""
    if glob.has_magic(repository) or (revision is not None and _COMMIT.fullmatch(revision)):
        return url
    hub: Any = importlib.import_module("huggingface_hub")
    commit = (
        hub.HfApi()
        .repo_info(
            repository,
            repo_type=kind.removesuffix("s/") or "model",
            revision=None if revision is None else unquote(revision),
        )
        .sha
    )
    at = f"hf://{kind}{repository}@{quote(commit, safe='')}{path}"
    if revision is None:
        log.warning("%s names no revision and may change; read at its present commit: %s", url, at)
    return at


def content_stamp(info: dict[str, Any]) -> str | None:
    """Return the hash of a file's content from its ``HfFileSystem.info``, or None if there is none.

    A file in Git LFS or Xet storage has the SHA-256 of its content; another one its Git blob.
    """
    lfs = info.get("lfs")
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    stamp = sha256 or info.get("blob_id")
    return None if stamp is None else str(stamp)

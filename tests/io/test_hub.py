"""Corpora of the Hugging Face Hub: pinned revisions, and content hashes as change stamps."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from psannlm.config.data import PathSource
from psannlm.data.corpus.documents import read_documents
from psannlm.data.corpus.files import file_stamp, find_files
from psannlm.errors import CorpusError
from psannlm.io.hub import pinned
from psannlm.prep.reader import Drops, find_sources

fsspec = pytest.importorskip("fsspec")
hub = pytest.importorskip("huggingface_hub")
FIRST, SECOND = "1" * 40, "2" * 40


class FakeHub:
    """Commits of the dataset tides/north: files by name; ``main`` is a branch, ``v1`` a tag."""

    def __init__(self) -> None:
        self.commits = {FIRST: {"a.txt": b"The tide comes in."}, SECOND: {"a.txt": b"The tide goes out."}}
        self.revisions = {"main": FIRST, "v1": FIRST, "refs/pr/3": SECOND}
        self.asked: list[str | None] = []

    def repo_info(self, repo_id: str, *, repo_type: str, revision: str | None = None) -> Any:
        self.asked.append(revision)
        assert (repo_id, repo_type) == ("tides/north", "dataset")
        if (name := revision or "main") not in self.revisions:
            raise hub.errors.RevisionNotFoundError(
                f"404: no revision {name}", response=SimpleNamespace(headers={}, request=None)
            )
        return SimpleNamespace(sha=self.revisions[name])


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A file system of the protocol ``hf`` whose ``info`` has the keys of ``HfFileSystem``."""
    fake = FakeHub()

    class FileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
        protocol = "hf"
        cachable = False

        def _files(self) -> dict[str, bytes]:
            roots = {f"datasets/tides/north@{commit}": files for commit, files in fake.commits.items()}
            return {f"{root}/{name}": content for root, files in roots.items() for name, content in files.items()}

        def _entry(self, name: str, content: bytes) -> dict[str, Any]:
            sha256 = hashlib.sha256(content).hexdigest()
            is_large = name.endswith(".jsonl")
            lfs = {"size": len(content), "sha256": sha256, "pointer_size": 130} if is_large else None
            # The blob of a file in LFS is that of its pointer.
            blob = hashlib.sha1(content).hexdigest()
            return {
                "name": name,
                "size": len(content),
                "type": "file",
                "blob_id": blob,
                "lfs": lfs,
                "last_commit": None,
            }

        def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
            path = self._strip_protocol(path).rstrip("/")
            found = [
                self._entry(name, content)
                for name, content in self._files().items()
                if name == path or name.startswith(f"{path}/")
            ]
            if not found:
                raise FileNotFoundError(path)
            return found if detail else [entry["name"] for entry in found]

        def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
            path = self._strip_protocol(path).rstrip("/")
            if path in self._files():
                return self._entry(path, self._files()[path])
            if any(name.startswith(f"{path}/") for name in self._files()):
                return {"name": path, "size": 0, "type": "directory"}
            raise FileNotFoundError(path)

        def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
            return io.BytesIO(self._files()[self._strip_protocol(path)])

    monkeypatch.setattr(hub.HfApi, "repo_info", lambda self, *args, **named: fake.repo_info(*args, **named))
    monkeypatch.setitem(importlib.import_module("fsspec.registry")._registry, "hf", FileSystem)
    pinned.cache_clear()
    yield fake
    pinned.cache_clear()


def texts(url: str) -> list[str]:
    return [document.text for document in read_documents([PathSource(path=url)])]


def test_hub_url_is_read_at_one_commit(remote: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    for revision, commit in (("v1", FIRST), ("refs/pr/3", SECOND), ("refs%2Fpr%2F3", SECOND), (SECOND, SECOND)):
        url = f"hf://datasets/tides/north@{revision}/a.txt"
        assert texts(url) == [remote.commits[commit]["a.txt"].decode()]
        # What manifests record.
        assert find_files(url, lambda *_: None) == ([f"hf://datasets/tides/north@{commit}/a.txt"], [])
    assert remote.asked == ["v1", "refs/pr/3", "refs/pr/3"]
    assert caplog.messages == []


def test_hub_url_without_revision_is_pinned_with_warning(remote: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    [first] = find_files("hf://datasets/tides/north/*.txt", lambda *_: None)[0]
    assert first == f"hf://datasets/tides/north@{FIRST}/a.txt"
    assert caplog.messages == [
        "hf://datasets/tides/north/*.txt names no revision and may change; read at its present commit: "
        f"hf://datasets/tides/north@{FIRST}/*.txt"
    ]
    # A branch that moves while a corpus is read changes nothing.
    remote.revisions["main"] = SECOND
    assert texts("hf://datasets/tides/north/*.txt") == ["The tide comes in."]


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl"])
def test_hub_stamp_tells_files_of_equal_size_apart(remote: FakeHub, name: str) -> None:
    contents = [json.dumps({"text": text}).encode() for text in ("high tide", "calm tide")]
    assert len(contents[0]) == len(contents[1])
    url = f"hf://datasets/tides/north@{FIRST}/{name}"
    stamps = []
    for content in (*contents, contents[0]):
        remote.commits[FIRST][name] = content
        stamps.append(file_stamp(url))
    assert stamps[0] == stamps[2] != stamps[1]
    assert stamps[0][0] == stamps[1][0]
    if name.endswith(".jsonl"):
        assert stamps[0][1] == hashlib.sha256(contents[0]).hexdigest()


def test_hub_file_changed_during_prep_is_noticed(remote: FakeHub) -> None:
    url = f"hf://datasets/tides/north@{FIRST}/a.txt"
    before = find_sources([url], Drops())
    remote.commits[FIRST]["a.txt"] = b"The tide is green."
    assert find_sources([url], Drops()) != before


def test_hub_errors_name_url_and_reason(remote: FakeHub) -> None:
    with pytest.raises(CorpusError, match=r"hf://datasets/tides/north@nosuch/a\.txt: .*404: no revision nosuch"):
        find_files("hf://datasets/tides/north@nosuch/a.txt", lambda *_: None)
    files, problems = find_files("hf://datasets/tides/north@v1/b.txt", lambda *_: None)
    assert files == []
    assert problems == [f"hf://datasets/tides/north@{FIRST}/b.txt: no such file or folder; check the spelling"]

"""Atomic writes: files are complete or absent, and errors name the cause."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from psannlm.errors import StorageError
from psannlm.io.atomic import (
    explain_write_errors,
    remove_leftovers,
    replacing,
    require_writable,
    sha256_file,
    temporary_beside,
    write_bytes,
    write_text,
)


def test_require_writable_leaves_no_file(tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    require_writable(tmp_path / "a" / "b" / "file")
    assert sorted(tmp_path.rglob("*")) == before
    write_text(tmp_path / "file", "kept")
    require_writable(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(StorageError, match="a file is in the place of a folder"):
        require_writable(tmp_path / "file" / "below")
    with pytest.raises(StorageError, match="it is a folder"):
        require_writable(tmp_path)
    with pytest.raises(StorageError, match=r"not allowed|could not write"):
        require_writable(Path("/proc/nothing/here"))


@pytest.mark.parametrize("n_bytes", [256, 300, 5000])
def test_a_name_that_is_too_long_is_named_beforehand(tmp_path: Path, n_bytes: int) -> None:
    for path in (tmp_path / ("n" * n_bytes), tmp_path / ("é" * (n_bytes // 2)) / "file"):
        for write in (require_writable, lambda path: write_text(path, "text")):
            with pytest.raises(StorageError, match=rf"of {n_bytes:,} bytes is too long") as refused:
                write(path)
            assert len(str(refused.value)) < 500
    require_writable(tmp_path / ("n" * 255))
    assert list(tmp_path.iterdir()) == []


def test_content_arrives_and_nothing_else_does(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    write_text(path, "é\r\n\n")
    assert path.read_bytes() == b"\xc3\xa9\r\n\n"
    write_bytes(path, b"")
    assert path.read_bytes() == b""
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_replacing_readers_see_old_file_until_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("ne", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
        assert temporary.parent.parent == path.parent  # a rename is atomic within one file system only
        temporary.write_text("new", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("had_content", [True, False])
def test_a_body_that_raises_changes_nothing(tmp_path: Path, error: BaseException, had_content: bool) -> None:
    path = tmp_path / "file"
    if had_content:
        path.write_bytes(b"old")
    expected = StorageError if isinstance(error, OSError) else type(error)

    def body() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(expected):
        body()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == ([("file", b"old")] if had_content else [])


def test_the_file_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a power cut may leave the new name with none of the new bytes."""
    events: list[str] = []
    original = Path.__fspath__
    monkeypatch.setattr("psannlm.io.atomic.sync_file", lambda path: events.append(f"sync {Path(path).name}"))
    monkeypatch.setattr(
        "psannlm.io.atomic.os.replace", lambda a, b: events.append(f"rename to {Path(original(b)).name}")
    )
    write_text(tmp_path / "file", "x")
    assert events == ["sync file", "rename to file", f"sync {tmp_path.name}"]


def test_full_disk_error_names_path_and_keeps_old_file(
    tmp_path: Path, largest_file: Callable[[int], AbstractContextManager[None]]
) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with largest_file(1000), pytest.raises(StorageError) as caught:
        write_bytes(path, bytes(100_000))
    message = str(caught.value)
    assert str(path) in message
    assert "MB free" in message
    assert "Earlier files are untouched" in message
    assert "\n" not in message
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "not enough disk space to write"),
        (errno.EDQUOT, "not enough disk space to write"),
        (errno.EFBIG, "not enough disk space to write"),
        (errno.EACCES, "not allowed to write"),
        (errno.EPERM, "not allowed to write"),
        (errno.EROFS, "not allowed to write"),
        (errno.EIO, "could not write"),
    ],
)
def test_system_errors_are_explained_in_words(tmp_path: Path, number: int, said: str) -> None:
    path = tmp_path / "missing" / "folder" / "file"
    with pytest.raises(StorageError, match=said) as caught, explain_write_errors(path):
        raise OSError(number, "the system's words")
    assert str(path) in str(caught.value)
    assert "the system's words" in str(caught.value)


def test_no_permission_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def refuse(self: Path, content: bytes) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(StorageError, match=r"not allowed to write .*file: Permission denied\. Choose a folder"):
        write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"


def test_file_in_place_of_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for below in ("below", "far/below"):
        with pytest.raises(StorageError, match=r"could not write .*below: a file is in the place of a folder"):
            write_text(tmp_path / "file" / below, "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="could not write"):
        write_text(tmp_path / "folder", "x")
    assert {p.name for p in tmp_path.iterdir()} == {"file", "folder"}


def test_leftovers_are_removed_by_content_not_name(tmp_path: Path) -> None:
    """Only a temporary folder whose marker names its own inode is ours, and an empty one of such a name."""
    kept = [".hidden", "a.tmp", ".latest.12.tmp", ".x.removed.7.tmp", ".psannlm-0123456789abcdef.tmp"]
    for name in kept:
        (tmp_path / name).write_text("x", encoding="utf-8")
    for name in (".step_00000001.12345.tmp", ".psannlm-0000000000000000.tmp", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("x", encoding="utf-8")
    (tmp_path / ".psannlm-1111111111111111.tmp").symlink_to(tmp_path / "elsewhere")
    with temporary_beside(tmp_path / "file") as ours:
        ours.write_text("half", encoding="utf-8")
        marker = next(path for path in ours.parent.iterdir() if path != ours)
        (tmp_path / ".psannlm-0000000000000000.tmp" / marker.name).write_bytes(marker.read_bytes())
        before = {
            path: path.is_file() and path.read_bytes()
            for path in tmp_path.rglob("*")
            if ours.parent not in path.parents
        }
        del before[ours.parent]
        (tmp_path / ".psannlm-2222222222222222.tmp").mkdir()
        remove_leftovers(tmp_path)
        assert not ours.parent.exists()
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_removal_killed_at_any_file_is_finished_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The marker goes last, in whichever order the file system lists a folder."""
    n_left, unlink, rmdir = 0, os.unlink, os.rmdir

    def counting(remove: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise KeyboardInterrupt  # in place of a kill
        remove(*args, **kwargs)

    for n_removed, of_a_resume in product(range(8), (False, True)):
        n_left = -1
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", partial(counting, unlink))
            patch.setattr(os, "rmdir", partial(counting, rmdir))
            with suppress(KeyboardInterrupt), temporary_beside(tmp_path / "checkpoint") as temporary:
                temporary.mkdir()
                for name in ("a", "model", "state", "z"):
                    (temporary / name).write_text("x", encoding="utf-8")
                    (temporary.parent / name).write_text("x", encoding="utf-8")
                n_left = 0 if of_a_resume else n_removed
            if of_a_resume:
                n_left = n_removed
                with suppress(KeyboardInterrupt):
                    remove_leftovers(tmp_path)
        assert len(list(tmp_path.iterdir())) == 1
        remove_leftovers(tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_temporary_names_cannot_be_guessed(tmp_path: Path) -> None:
    with temporary_beside(tmp_path / "file") as one, temporary_beside(tmp_path / "file") as other:
        assert one.parent != other.parent
        assert one.parent.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_sha256_file_matches_hashlib(tmp_path: Path, size: int) -> None:
    content = bytes(i % 251 for i in range(size))
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()

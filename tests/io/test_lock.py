"""One process at a time in a folder; and a lock that blocks nobody once its process is gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from psannlm.errors import StorageError
from psannlm.io.lock import LOCK_FILE, RunLock

HOLDER = """
import sys, time
from pathlib import Path
from psannlm.io.lock import RunLock
RunLock(Path(sys.argv[1])).__enter__()
print("held", flush=True)
time.sleep(60)
"""


def test_lock_second_owner_is_refused_by_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RunLock(run):
        with pytest.raises(StorageError) as caught, RunLock(run):
            pass
        for said in (str(run), f"process {os.getpid()} ", "train.checkpoint_dir"):
            assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        with pytest.raises(StorageError), RunLock(run):  # the one that was refused has not let go of it
            pass
        with pytest.raises(StorageError, match=r"another folder with --out$"), RunLock(run, "--out"):
            pass
        with RunLock(tmp_path / "other"):
            pass


def test_nothing_is_left_but_what_was_written(tmp_path: Path) -> None:
    with RunLock(tmp_path / "runs" / "a"):
        pass
    assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path / "runs" / "a"):
        (tmp_path / "runs" / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "runs" / "a").iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    with RunLock(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir(), "a folder that was there before is not ours to remove"


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StorageError, match=f"process {holder.pid} "), RunLock(tmp_path):
        pass
    holder.kill()
    holder.communicate(timeout=30)
    assert (tmp_path / LOCK_FILE).is_file()
    with RunLock(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text() == f"{os.getpid()}\n"


def test_lock_stays_with_name_when_folder_is_renamed(tmp_path: Path) -> None:
    run, aside = tmp_path / "run", tmp_path / "aside"
    with RunLock(run) as lock:
        (run / "file").touch()
        lock.move_folder(aside)
        assert [path.name for path in aside.iterdir()] == ["file"]
        with RunLock(aside):
            pass
        with pytest.raises(StorageError), RunLock(run):
            pass
    with RunLock(run):
        pass


def test_lock_file_removed_while_locking_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that held it ended between our opening of its file and our locking it."""
    import fcntl

    original = fcntl.flock
    gone: list[int] = []

    def late(handle: int, how: int) -> None:
        if not gone:
            gone.append(handle)
            (tmp_path / LOCK_FILE).unlink()
        original(handle, how)

    monkeypatch.setattr("fcntl.flock", late)
    with RunLock(tmp_path), pytest.raises(StorageError), RunLock(tmp_path):
        pass
    assert gone


def test_lock_works_on_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with RunLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["symlink", "dangling", "hard link", "text", "fifo", "folder"])
def test_lock_refuses_and_keeps_foreign_file(tmp_path: Path, kind: str) -> None:
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.write_text("precious", encoding="utf-8")
    lock = run / LOCK_FILE
    if kind == "symlink":
        lock.symlink_to(victim)
    elif kind == "dangling":
        lock.symlink_to(tmp_path / "nowhere")
    elif kind == "hard link":
        lock.hardlink_to(victim)
    elif kind == "text":
        lock.write_text("a novel\n", encoding="utf-8")
    elif kind == "fifo":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    before = lock.lstat()
    with pytest.raises(StorageError, match=r"\.lock is in the way"), RunLock(run):
        pass
    assert os.path.samestat(lock.lstat(), before)
    assert victim.read_text(encoding="utf-8") == "precious"
    assert kind != "text" or lock.read_text(encoding="utf-8") == "a novel\n"
    assert not (tmp_path / "nowhere").exists()


def test_lock_leaves_empty_file_of_user(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).touch()
    with RunLock(tmp_path):
        with pytest.raises(StorageError), RunLock(tmp_path):
            pass
    assert (tmp_path / LOCK_FILE).read_bytes() == b""

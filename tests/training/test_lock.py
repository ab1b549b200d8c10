"""One training at a time in a run folder; and a lock that blocks nobody once its process is gone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from psannlm.config.run import RunConfig
from psannlm.errors import PsannlmError, StorageError
from psannlm.training.lock import LOCK_FILE, RunLock
from psannlm.training.progress import SilentReporter
from psannlm.training.run import train

TinyRun = Callable[..., RunConfig]
HOLDER = """
import sys, time
from pathlib import Path
from psannlm.training.lock import RunLock
RunLock(Path(sys.argv[1])).__enter__()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_one_is_refused_by_folder_and_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RunLock(run):
        with pytest.raises(StorageError) as caught, RunLock(run):
            pass
        for said in (str(run), f"process {os.getpid()} ", "train.checkpoint_dir"):
            assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        with pytest.raises(StorageError), RunLock(run):  # the one that was refused has not let go of it
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


def test_a_killed_process_blocks_nobody(tmp_path: Path) -> None:
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


def test_the_lock_stays_with_the_name_and_leaves_the_folder_that_moves(tmp_path: Path) -> None:
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


def test_a_file_that_goes_as_it_is_locked_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_file_system_without_locks_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with RunLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_no_curve")
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_is_held_from_before_its_corpus_is_read_to_its_last_step(tiny_run: TinyRun, resume: str) -> None:
    refused: list[str] = []

    class Second(SilentReporter):
        def notice(self, text: str) -> None:
            self.again()

        def step(self, step: int, loss: float, lr: float, tokens_per_s: float, is_logged: bool) -> None:
            self.again()

        def again(self) -> None:
            with pytest.raises(StorageError, match="is training in"):
                train(config, resume=resume)
            refused.append("")

    config = tiny_run(max_steps=2)
    train(config)
    train(config, resume="never", reporter=Second())
    assert len(refused) > 4
    folder = Path(config.train.checkpoint_dir)
    (aside,) = folder.parent.glob("run_until_*")
    assert not [path for path in (*folder.iterdir(), *aside.iterdir()) if path.name == LOCK_FILE]


def test_a_folder_that_cannot_be_written_is_found_before_the_corpus_is_read(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psannlm.training.run.prepare", lambda *a: pytest.fail("read the corpus"))
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(StorageError, match="a file stands where a folder must be"):
            train(tiny_run(checkpoint_dir=str(folder)))


def test_a_run_that_fails_before_it_writes_leaves_no_folder(tiny_run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(PsannlmError, match="shorter than one window"):
        train(tiny_run(data={"max_length": 90_000}, batch_tokens=180_000, checkpoint_dir=str(tmp_path / "runs" / "a")))
    assert not (tmp_path / "runs").exists()

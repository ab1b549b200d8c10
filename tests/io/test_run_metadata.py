"""Dated folders and system information."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from psannlm.errors import StorageError
from psannlm.io import run_metadata
from psannlm.io.run_metadata import new_folder, system_info, timestamp, write_json


def test_the_time_is_utc_and_sorts(monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import datetime, timezone

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            assert tz is timezone.utc
            return datetime(2026, 3, 4, 5, 6, 7, tzinfo=tz)

    monkeypatch.setattr(run_metadata, "datetime", Fixed)
    assert timestamp() == "20260304_050607"


def test_two_in_one_second_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_metadata, "timestamp", lambda: "20260304_050607")
    names = [str(new_folder("kv_cache")) for _ in range(3)]
    stem = "reports/kv_cache/20260304_050607"
    assert names == [stem, f"{stem}_2", f"{stem}_3"]
    assert all(Path(name).is_dir() for name in names)


def test_existing_out_gets_dated_folder_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_metadata, "timestamp", lambda: "20260304_050607")
    out = tmp_path / "a" / "b"
    assert [new_folder("x", out) for _ in range(3)] == [out, out / "20260304_050607", out / "20260304_050607_2"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StorageError):
        new_folder("x", tmp_path / "link")
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_that_cannot_be_made_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reports").write_text("a file", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match="reports"):
        new_folder("kv_cache")
    with pytest.raises(StorageError, match="reports"):
        new_folder("x", tmp_path / "reports" / "y")


def test_system_info_is_plain_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/psannlm", "train", "a b.yaml", "--set", "train.lr=1"])
    info = system_info()
    assert json.loads(json.dumps(info)) == info
    assert info["command"] == "psannlm train 'a b.yaml' --set train.lr=1"
    assert info["packages"]["torch"]
    assert info["threads"] >= 1
    assert info["processor"]
    assert info["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", info["commit"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", info["time_utc"])


@pytest.mark.parametrize("failure", ["missing", "slow", "outside"])
def test_system_info_without_git_has_no_commit(monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    def run(command: list[str], **settings: Any) -> Any:
        if failure == "missing":
            raise FileNotFoundError("git")
        if failure == "slow":
            raise subprocess.TimeoutExpired(command, 5)
        return subprocess.CompletedProcess(command, 128, "", "fatal: not a git repository")

    monkeypatch.setattr("psannlm.io.run_metadata.subprocess.run", run)
    assert system_info()["commit"] is None


def test_a_checkout_with_changes_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **settings: Any) -> Any:
        return subprocess.CompletedProcess(command, 0, "a" * 40 + "\n" if "rev-parse" in command else changes, "")

    monkeypatch.setattr("psannlm.io.run_metadata.subprocess.run", run)
    changes = ""
    assert system_info()["commit"] == "a" * 40
    changes = " M file\n"
    assert system_info()["commit"] == "a" * 40 + "+"


def test_json_is_readable_and_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "x" / "metrics.json", {"é": [1, 2.5, None]})
    text = (tmp_path / "x" / "metrics.json").read_text(encoding="utf-8")
    assert text == '{\n  "é": [\n    1,\n    2.5,\n    null\n  ]\n}\n'

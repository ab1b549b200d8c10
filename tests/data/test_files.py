"""Paths are all checked before anything is read, and every file is opened whole or refused by name."""

from __future__ import annotations

import gzip
import os
import socket
import sys
from collections import Counter
from pathlib import Path

import pytest

from psannlm.data.files import decoded, find_files, opened, read_text, split_suffix
from psannlm.errors import CorpusError


def found(pattern: Path | str) -> tuple[list[str], list[str], Counter[str]]:
    drops: Counter[str] = Counter()
    files, problems = find_files(str(pattern), lambda reason, name: drops.update([reason]))
    return files, problems, drops


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text", encoding="utf-8")


def test_a_folder_is_read_to_the_bottom_in_one_order_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    make(
        tmp_path, "b.txt", "a/z.jsonl", "a/y.TXT.gz", "c/d/e.txt", "c/readme.md", "c/x.gz", ".hidden.txt", ".git/f.txt"
    )
    files, problems, drops = found(tmp_path)
    assert [os.path.relpath(file, tmp_path) for file in files] == ["a/y.TXT.gz", "a/z.jsonl", "b.txt", "c/d/e.txt"]
    assert not problems
    assert drops == {"file of another kind": 2, "hidden entry": 2}


def test_a_glob_takes_files_and_folders_and_gives_each_file_once(tmp_path: Path) -> None:
    make(tmp_path, "one/a.txt", "two/b.txt", "two/c.md", "three.txt")
    assert [Path(file).name for file in found(tmp_path / "t*")[0]] == ["three.txt", "b.txt"]
    files, problems, _ = found(tmp_path / "**")
    assert sorted(Path(file).name for file in files) == ["a.txt", "b.txt", "three.txt"]
    assert not problems


def test_a_file_named_outright_is_plain_text_whatever_its_suffix(tmp_path: Path) -> None:
    make(tmp_path, "notes.md", "README", "more.rst")
    assert found(tmp_path / "README")[0] == [str(tmp_path / "README")]
    assert found(tmp_path / "*.md")[0] == [str(tmp_path / "notes.md")]


def test_brackets_in_the_name_of_a_file_that_exists_are_no_pattern(tmp_path: Path) -> None:
    make(tmp_path, "log[1].txt")
    assert found(tmp_path / "log[1].txt")[0] == [str(tmp_path / "log[1].txt")]


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.json.gz", "a.pdf", "a.tar.gz", "a.parquet.gz"])
def test_formats_that_would_be_misread_are_refused(tmp_path: Path, name: str) -> None:
    make(tmp_path, name)
    (problem,) = found(tmp_path / name)[1]
    assert name in problem
    assert ".jsonl" in problem


def test_a_missing_path_names_its_near_neighbour(tmp_path: Path) -> None:
    make(tmp_path, "corpus/english.txt")
    for wrong, near in (("corpus/englsh.txt", "english.txt"), ("corpsu/english.txt", "corpus"), ("corpus/e?.txt", "")):
        files, (problem,), _ = found(tmp_path / wrong)
        assert not files
        assert wrong in problem
        assert f"did you mean '{near}'" in problem or not near


def test_a_folder_without_text_is_a_problem(tmp_path: Path) -> None:
    make(tmp_path, "a/b.md")
    (problem,) = found(tmp_path)[1]
    assert "no text in this folder" in problem


@pytest.mark.parametrize("inside", [True, False])
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path, inside: bool) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (problem,) = found(tmp_path if inside else tmp_path / "pipe.txt")[1]
    assert "pipe.txt: not a regular file" in problem


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("s.txt")
        assert "not a regular file" in found("s.txt")[1][0]


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "**"])
def test_links_in_a_circle_are_named_and_not_followed(tmp_path: Path, pattern: str) -> None:
    make(tmp_path, "a/b/c.txt")
    for name in ("one", "two"):
        (tmp_path / "a" / "b" / name).symlink_to(tmp_path / "a")
    _, problems, _ = found(tmp_path / pattern)
    assert len(problems) == 2
    assert all("leads back to" in problem for problem in problems)


def test_a_folder_linked_beside_itself_is_read_once(tmp_path: Path) -> None:
    make(tmp_path, "a/c.txt")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    files, problems, drops = found(tmp_path)
    assert [os.path.relpath(file, tmp_path) for file in files] == ["a/c.txt"]
    assert not problems
    assert drops == {"folder linked twice": 1}


def test_a_link_to_nowhere_and_a_link_to_itself_are_problems(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    _, problems, _ = found(tmp_path)
    assert ["gone.txt" in problems[0], "self.txt" in problems[1]] == [True, True]
    assert all("link" in problem for problem in problems)


def test_a_file_without_permission_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.txt", "b.txt")
    # Root may read anything, so the refusal is played.
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("a.txt"))
    files, (problem,), _ = found(tmp_path)
    assert [Path(file).name for file in files] == ["b.txt"]
    assert "a.txt: permission denied" in problem


def test_a_folder_without_permission_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "open/a.txt", "shut/b.txt")
    list_folder = os.listdir

    def refuse(path: str) -> list[str]:
        if path.endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return list_folder(path)

    monkeypatch.setattr(os, "listdir", refuse)
    files, (problem,), _ = found(tmp_path)
    assert [Path(file).name for file in files] == ["a.txt"]
    assert "shut: Permission denied" in problem


@pytest.mark.parametrize("module", ["zstandard", "pyarrow"])
def test_a_missing_extra_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    name = {"zstandard": "a.txt.zst", "pyarrow": "a.parquet"}[module]
    make(tmp_path, name)
    monkeypatch.setitem(sys.modules, module, None)
    (problem,) = found(tmp_path / name)[1]
    assert module in problem
    assert "pip install '.[data]'" in problem


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"waves " * 1000)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (whole[:-9], bytes(flipped), b"not gzip at all"):
        (tmp_path / "a.txt.gz").write_bytes(content)
        with pytest.raises(CorpusError, match=r"a\.txt\.gz: damaged or cut short"):
            read_text(str(tmp_path / "a.txt.gz"))


def test_zstandard_files_are_read_over_frames_and_cut_ones_named(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    text = os.urandom(300_000).hex()
    frames = [zstandard.compress(part.encode()) for part in (text[:1000], text[1000:])]
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"".join(frames))
    assert read_text(str(path)) == (text, False)
    with opened(str(path)) as file:
        assert file.readline(70) == text[:70].encode()
    for content in (b"".join(frames)[:-5], frames[0] + b"rubbish after the frame", b"not zstandard"):
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=r"a\.txt\.zst: damaged or cut short"):
            read_text(str(path))


def test_a_file_that_vanishes_before_it_is_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"gone\.txt: cannot be read: No such file"):
        read_text(str(tmp_path / "gone.txt"))


@pytest.mark.parametrize(("offset", "mark"), [(0, b""), (0, b"\xef\xbb\xbf"), (70_000, b"")])
def test_a_byte_that_is_not_utf_8_is_named_with_its_place(offset: int, mark: bytes) -> None:
    with pytest.raises(
        CorpusError, match=rf"a\.txt: byte {offset + len(mark) + 6:,} is 0xE9.*iconv -f latin1 -t utf-8"
    ):
        decoded(mark + b"wave x\xe9t", "a.txt", offset)


def test_utf_16_is_recognised_by_its_mark() -> None:
    with pytest.raises(CorpusError, match="iconv -f utf-16"):
        decoded("waves".encode("utf-16"), "a.txt", 0)


def test_a_byte_order_mark_is_taken_off_only_at_the_start() -> None:
    mark = b"\xef\xbb\xbf"
    assert decoded(mark + b"a", "a.txt", 0) == ("a", True)
    assert decoded(mark + b"a", "a.txt", 10) == ("\ufeffa", False)
    assert decoded(mark * 2, "a.txt", 0) == ("\ufeff", True)


def test_suffixes_are_read_in_any_case() -> None:
    assert split_suffix("x/A.TXT.GZ") == (".txt", ".gz")
    assert split_suffix("x.d/a") == ("", "")
    assert split_suffix("a.jsonl") == (".jsonl", "")

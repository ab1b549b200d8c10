"""Finding and opening corpus files: paths, globs, URLs, compression and errors."""

from __future__ import annotations

import gzip
import io
import os
import re
import socket
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from urllib.parse import quote

import pytest

from psannlm.data.corpus.files import find_files, is_remote, split_suffix
from psannlm.data.corpus.reading import decoded, opened, read_lines, read_text
from psannlm.errors import CorpusError
from psannlm.io.urls import PROTOCOLS


def found(pattern: Path | str) -> tuple[list[str], list[str], Counter[str]]:
    drops: Counter[str] = Counter()
    files, problems = find_files(str(pattern), lambda reason, name: drops.update([reason]))
    return files, problems, drops


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text", encoding="utf-8")


def test_find_files_in_folder_is_ordered_and_counts_omissions(tmp_path: Path) -> None:
    make(
        tmp_path, "b.txt", "a/z.jsonl", "a/y.TXT.gz", "c/d/e.txt", "c/readme.md", "c/x.gz", ".hidden.txt", ".git/f.txt"
    )
    files, problems, drops = found(tmp_path)
    assert [os.path.relpath(file, tmp_path) for file in files] == ["a/y.TXT.gz", "a/z.jsonl", "b.txt", "c/d/e.txt"]
    assert not problems
    assert drops == {"file of another kind": 2, "hidden entry": 2}


def test_find_files_glob_returns_each_file_once(tmp_path: Path) -> None:
    make(tmp_path, "one/a.txt", "two/b.txt", "two/c.md", "three.txt")
    assert [Path(file).name for file in found(tmp_path / "t*")[0]] == ["three.txt", "b.txt"]
    files, problems, _ = found(tmp_path / "**")
    assert sorted(Path(file).name for file in files) == ["a.txt", "b.txt", "three.txt"]
    assert not problems


def test_find_files_explicit_file_has_any_suffix(tmp_path: Path) -> None:
    make(tmp_path, "notes.md", "README", "more.rst")
    assert found(tmp_path / "README")[0] == [str(tmp_path / "README")]
    assert found(tmp_path / "*.md")[0] == [str(tmp_path / "notes.md")]


def test_find_files_existing_name_with_brackets_is_literal(tmp_path: Path) -> None:
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


def test_find_files_broken_and_cyclic_links_are_problems(tmp_path: Path) -> None:
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
def test_missing_extra_error_has_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    name = {"zstandard": "a.txt.zst", "pyarrow": "a.parquet"}[module]
    make(tmp_path, name)
    monkeypatch.setitem(sys.modules, module, None)
    (problem,) = found(tmp_path / name)[1]
    assert module in problem
    assert "pip install -c constraints.txt '.[data]'" in problem


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"waves " * 1000)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (whole[:-9], bytes(flipped), b"not gzip at all"):
        (tmp_path / "a.txt.gz").write_bytes(content)
        with pytest.raises(CorpusError, match=r"a\.txt\.gz: damaged or cut short"):
            read_text(str(tmp_path / "a.txt.gz"))


def test_opened_zstd_frames_are_read_and_truncation_named(tmp_path: Path) -> None:
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


def test_opened_vanished_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"gone\.txt: cannot be read: No such file"):
        read_text(str(tmp_path / "gone.txt"))


@pytest.mark.parametrize(("offset", "mark"), [(0, b""), (0, b"\xef\xbb\xbf"), (70_000, b"")])
def test_decoded_invalid_byte_error_names_position(offset: int, mark: bytes) -> None:
    with pytest.raises(
        CorpusError, match=rf"a\.txt: byte {offset + len(mark) + 6:,} is 0xE9.*iconv -f latin1 -t utf-8"
    ):
        decoded(mark + b"wave x\xe9t", "a.txt", offset)


def test_utf_16_is_recognised_by_its_mark() -> None:
    with pytest.raises(CorpusError, match="iconv -f utf-16"):
        decoded("waves".encode("utf-16"), "a.txt", 0)


def test_decoded_removes_bom_only_at_start() -> None:
    mark = b"\xef\xbb\xbf"
    assert decoded(mark + b"a", "a.txt", 0) == ("a", True)
    assert decoded(mark + b"a", "a.txt", 10) == ("\ufeffa", False)
    assert decoded(mark * 2, "a.txt", 0) == ("\ufeff", True)


def test_suffixes_are_read_in_any_case() -> None:
    assert split_suffix("x/A.TXT.GZ") == (".txt", ".gz")
    assert split_suffix("x.d/a") == ("", "")
    assert split_suffix("a.jsonl") == (".jsonl", "")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a", "a.txt.zst", "a.txt.gz"])
@pytest.mark.parametrize("packer", ["gzip", "zstandard"])
def test_compressed_files_are_read_under_any_name(tmp_path: Path, name: str, packer: str) -> None:
    module = pytest.importorskip(packer)
    (tmp_path / name).write_bytes(module.compress("wåves\n".encode()))
    assert read_text(str(tmp_path / name)) == ("wåves\n", False)


def test_opened_plain_text_named_gz_recommends_rename(tmp_path: Path) -> None:
    for name in ("a.txt.gz", "a.txt.zst"):
        (tmp_path / name).write_text("plain text")
        with pytest.raises(CorpusError, match=rf"{name}: damaged or cut short .*if it is plain text, rename it"):
            read_text(str(tmp_path / name))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(gzip.compress(b"text")))
    with pytest.raises(CorpusError, match="compressed twice"):
        read_text(str(tmp_path / "b.txt.gz"))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"\x89PNG\r\n\x1a\n\0\0\0\r"))
    with pytest.raises(CorpusError, match="decompressed, is a PNG image"):
        read_text(str(tmp_path / "c.txt.gz"))


def test_every_stored_byte_is_shown_once_in_order(tmp_path: Path) -> None:
    for number, content in enumerate((b"text " * 5000, gzip.compress(os.urandom(50_000).hex().encode()), b"")):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(content)
        shown = bytearray()
        with opened(str(path), shown.extend) as file:
            file.read(10)
        assert bytes(shown) == content


def test_a_line_longer_than_may_be_held_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psannlm.data.corpus.reading.MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"fine\n" + b"x" * (1 << 20) + b"\n"))
    with pytest.raises(CorpusError, match=r"a\.txt\.gz:2: a line of more than 1 MiB"):
        list(read_lines(str(path)))
    path.write_bytes(gzip.compress(b"fine\n" + b"x" * ((1 << 20) - 1) + b"\n"))
    assert [len(line) for line in read_lines(str(path))] == [5, 1 << 20]


def test_read_whole_too_long_raises_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psannlm.data.corpus.reading.max_document_bytes", lambda: 3 << 20)
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"waves\n" * (10 << 20), 1))
    tracemalloc.start()
    with pytest.raises(CorpusError, match=r"a\.txt\.gz: one document of more than 3,145,728 bytes.*psannlm prep"):
        read_text(str(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20


def test_memory_that_runs_out_is_blamed_on_the_file(tmp_path: Path) -> None:
    make(tmp_path, "a.txt")
    with pytest.raises(CorpusError, match=r"a\.txt: memory ran out"), opened(str(tmp_path / "a.txt")):
        raise MemoryError


SET = "set [2013] a?b*{c} 100%"


def test_names_with_brackets_are_read_where_they_exist(tmp_path: Path) -> None:
    make(tmp_path, f"{SET}/a.txt", f"{SET}/b.txt", "set 2/c.txt")
    for pattern in (f"{tmp_path}/{SET}", f"{tmp_path}/{SET}/*.txt", f"{tmp_path}/{SET}/[ab].txt"):
        for url in (pattern, f"file://{pattern}", f"file:{pattern}", f"file://localhost{pattern}"):
            files, problems, _ = found(url)
            assert [Path(file).name for file in files] == ["a.txt", "b.txt"], problems
    # Brackets are a pattern where nothing is called so.
    assert [Path(file).name for file in found(f"file://{tmp_path}/set [2]/*.txt")[0]] == ["c.txt"]
    quoted = f"file://{tmp_path}/" + quote(SET)
    assert found(quoted)[0] == found(f"{tmp_path}/{SET}")[0]


def test_url_not_found_is_a_missing_file(tmp_path: Path) -> None:
    make(tmp_path, "a/b.md")
    for url, said in ((f"file://{tmp_path}/no", "no such file"), (f"file://{tmp_path}/a", "no text in this folder")):
        (problem,) = found(url)[1]
        assert said in problem
        assert str(tmp_path) in problem
    assert "names another machine" in found("file://elsewhere/a.txt")[1][0]


def test_find_files_remote_names_with_brackets_are_literal() -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe("/names/set [2013]/a.txt", b"text")
    for url in ("memory://names/set [2013]", "memory://names/set [2013]/a.txt", "memory://names/set*/*.txt"):
        assert found(url)[0] == ["memory:///names/set [2013]/a.txt"]
    assert "memory://names/x: no such file" in found("memory://names/x")[1][0]
    assert "memory://names/*.jsonl: nothing matches" in found("memory://names/*.jsonl")[1][0]


@pytest.mark.parametrize(
    "url",
    [
        "reference://::file:///tmp/a.json",
        "reference://x",
        "memory:/x",
        "memory::file:///tmp/a.txt",
        "filecache::s3://bucket/a.txt",
        "simplecache::https://host/a.txt",
        "github://owner:name@main/a.txt",
        "github:/x",
        "ftp://host/a.txt",
        "FTP://host/a.txt",
        "zip://a.txt::file:///tmp/a.zip",
        "https://host/a.zip::memory://x",
        "s3://bucket/a::b",
        "local:///tmp",
        "data:,x://",
        "dir::file:///tmp",
        "ssh://host/a.txt",
        "file::x",
    ],
)
def test_protocols_that_are_not_listed_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = pytest.importorskip("fsspec.registry")
    monkeypatch.setattr(registry, "get_filesystem_class", lambda protocol: pytest.fail(f"{protocol} was opened"))
    files, (problem,), _ = found(url)
    assert not files
    assert url in problem
    with pytest.raises(CorpusError):
        read_text(url)


def test_paths_that_look_like_urls_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a::b.txt", "memory:/c.txt")
    monkeypatch.chdir(tmp_path)
    for path in ("a::b.txt", "memory:/c.txt", f"file://{tmp_path}/a::b.txt"):
        assert [os.path.basename(file) for file in found(path)[0]] == [os.path.basename(path)]
    assert found("a::*.txt")[0] == ["a::b.txt"]
    assert not is_remote("a::b.txt")


def test_the_protocols_are_those_that_are_documented() -> None:
    text = Path(__file__).parents[3].joinpath("SECURITY.md").read_text(encoding="utf-8")
    listed = text.partition("of no others: ")[2].partition("(")[0]
    assert re.findall(r"`(\w+)`", listed) == list(PROTOCOLS)
    assert split_suffix("https://host/a.txt.gz?download=1#x") == (".txt", ".gz")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xef\xbb\xbfone\r\ntwo", None),
        (gzip.compress(b"one\r\ntwo"), None),
        ("one\ntwo".encode("utf-16"), "is UTF-16, not UTF-8"),
        ("one\ntwo".encode("utf-16-le"), "is UTF-16LE, not UTF-8"),
        (b"one\ntw\xe9", "byte 6 is 0xE9, which is not UTF-8"),
        (b"\x7fELF" + bytes(100), "is an ELF program"),
    ],
    ids=["mark", "gzip", "utf-16", "utf-16le", "latin-1", "elf"],
)
def test_standard_input_is_read_like_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, said: str | None
) -> None:
    path = tmp_path / "FILE"
    path.write_bytes(content)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    outcomes: list[object] = []
    for name in (str(path), "-"):
        if said is None:
            outcomes.append(list(read_lines(name)))
        else:
            with pytest.raises(CorpusError, match=said) as raised:
                list(read_lines(name))
            outcomes.append(str(raised.value).replace(f"utf-8 {path}", "utf-8 FILE").replace(str(path), "stdin"))
    assert outcomes[0] == outcomes[1]
    assert said is not None or outcomes[0] == ["one\r\n", "two"]

"""Records: writing, finding and ownership."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from psannlm.io.records import find_records, read_record, write_record
from psannlm.reports.gather import gather


def test_a_record_is_written_found_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "prepared"
    for tokens in (5, 7):
        assert write_record(folder, "prep", {"tokens": tokens}, "a table\n")
        assert {path.name for path in folder.iterdir()} == {"metrics.json", "system.json", "table.txt"}
        figures = read_record(folder) or {}
        assert (figures["record"], figures["tokens"]) == ("prep", tokens)
    assert list(find_records(tmp_path)) == [(folder, "prep")]
    [artifact] = gather(tmp_path / "reports", [], records=[tmp_path]).artifacts
    assert (artifact.kind, artifact.figures["tokens"], artifact.table) == ("prep", 7, "a table\n")


@pytest.mark.parametrize("name", ["metrics.json", "system.json", "table.txt"])
def test_record_leaves_files_of_other_programs(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"mine": 1}', encoding="utf-8")
    assert not write_record(tmp_path, "prep", {}, "")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text(encoding="utf-8") == '{"mine": 1}'


@pytest.mark.parametrize("name", ["metrics.json", "system.json", "table.txt"])
@pytest.mark.parametrize("kind", ["edited", "link"])
def test_record_leaves_what_user_put_in_it(name: str, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    assert write_record(folder, "prep", {}, "a table\n")
    (folder / name).unlink()
    if kind == "edited":
        (folder / name).write_text("my own words", encoding="utf-8")
    else:
        (folder / name).symlink_to(tmp_path / "nowhere")
    before = (folder / name).lstat()
    assert not write_record(folder, "prep", {}, "another table\n")
    after = (folder / name).lstat()  # the time of the last access may differ: the file was read
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)
    assert not (tmp_path / "nowhere").exists()


def test_figures_of_other_programs_are_not_records(tmp_path: Path) -> None:
    for name, content in (
        ("a", "[1]"),
        ("b", "{"),
        ("c", json.dumps({"record": "vinyl"})),
        (".d", '{"record": "prep"}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(content, encoding="utf-8")
    assert list(find_records(tmp_path)) == []
    assert gather(tmp_path / "reports", [], records=[tmp_path]).is_empty

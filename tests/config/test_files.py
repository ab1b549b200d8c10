from __future__ import annotations

from pathlib import Path

import pytest

from psannlm.config.data import BuiltinSource, DataConfig, PathSource
from psannlm.config.files import missing_files
from psannlm.config.run import config_from_mapping


def check(*sources: str, tokenizer: str | None = None) -> list[str]:
    data = DataConfig(sources=tuple(PathSource(path=path) for path in sources), tokenizer_model_path=tokenizer)
    return [issue.message for issue in missing_files(data)]


@pytest.fixture
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "letters.txt").write_text("a")
    (tmp_path / "odd[1].txt").write_text("a")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_folder")
def test_files_folders_and_globs_that_lead_somewhere_pass() -> None:
    assert check("corpus", "corpus/letters.txt", "corpus/*.txt", "**/*.txt", "odd[1].txt") == []
    assert check("corpus", tokenizer="corpus/letters.txt") == []
    assert list(missing_files(DataConfig(sources=(BuiltinSource(builtin="python-reference"),)))) == []


@pytest.mark.usefixtures("_folder")
def test_missing_file_is_named_with_nearest_name(tmp_path: Path) -> None:
    first, second, third, fourth = check("corpus/leters.txt", "corpsu/letters.txt", "corpus/*.md", "/no/such/place")
    assert first.startswith("'corpus/leters.txt' is not a file or folder (did you mean 'letters.txt'?)")
    assert second.startswith(
        "'corpsu/letters.txt' is not a file or folder: 'corpsu' does not exist (did you mean 'corpus'?)"
    )
    assert str(tmp_path) in second
    assert third.startswith("no file matches 'corpus/*.md'")
    assert fourth.startswith("'/no/such/place' is not a file or folder: '/no' does not exist")


@pytest.mark.usefixtures("_folder")
def test_urls_are_judged_as_they_are_when_read(tmp_path: Path) -> None:
    (tmp_path / "set [2013]").mkdir()
    (tmp_path / "set [2013]" / "a.txt").write_text("a")
    for path in ("", "/a.txt", "/*.txt"):
        assert check(f"set [2013]{path}", f"file://{tmp_path}/set [2013]{path}", f"file:{tmp_path}/set%20[2013]") == []
    assert check("https://host/a.txt", "s3://bucket/*.jsonl") == []
    for url in ("reference://::file:///x", "memory:/x", "simplecache::https://host/x", "github://a:b@c/x", "ftp://h/x"):
        (refused,) = check(url)
        assert refused.startswith(url)
    assert check("file:///no/such/place")[0].startswith("'/no/such/place' is not a file or folder")
    assert check("file://elsewhere/x")[0].startswith("'file://elsewhere/x' names another machine")


@pytest.mark.usefixtures("_folder")
def test_a_tokenizer_must_be_a_file() -> None:
    assert check("corpus", tokenizer="corpus")[0].startswith("'corpus' is not a file")
    assert check("corpus", tokenizer="x" * 5000)[0].endswith(str(Path.cwd()))


@pytest.mark.usefixtures("_folder")
def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    assert check("~/corpus", "~/corpus/*.txt", tokenizer="~/corpus/letters.txt") == []
    [missing] = check("~/corpsu/letters.txt")
    assert missing.startswith(f"'~/corpsu/letters.txt' is not a file or folder: '{tmp_path}/corpsu' does not exist")


@pytest.mark.parametrize("word", ["none", "None", "no", "auto"])
def test_word_for_no_tokenizer_gets_advice_of_null(word: str) -> None:
    (issue,) = missing_files(config_from_mapping({"data": {"tokenizer_model_path": word}}, check_files=False).data)
    assert issue.message.endswith("; write null to fit one on the corpus")

"""psannlm prep: from a corpus to a folder, a table, one JSON document, and the right exit code."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psannlm.config.data import DataConfig, PathSource
from psannlm.config.run import load_config
from psannlm.data.manifest import read_manifest
from psannlm.data.prepare import load_corpus
from psannlm.tokenizers.resolve import fit_tokenizer

Run = Callable[..., Any]


@pytest.fixture
def tokenizer(tiny_texts: list[str], tmp_path: Path) -> Path:
    return fit_tokenizer(tiny_texts, "simple", 300).save(tmp_path / "tokenizer.json")


@pytest.mark.slow
def test_prep_and_again(psannlm: Run, tiny_corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["prep", str(tiny_corpus), "--per-line", "--tokenizer", str(tokenizer), "--out", str(out)]
    first = psannlm(*arguments, "--val-split", "0.2")
    assert first.code == 0
    for said in ("train", "validation", "bytes per token", "duplicates left out", "MB/s", "psannlm train"):
        assert said in first.out
    manifest = read_manifest(out)
    assert manifest.tokenizer.backend == "simple"
    again = psannlm(*arguments, "--val-split", "0.2", "--json")
    result = json.loads(again.out)
    assert (result["was_done"], result["content_sha256"]) == (True, manifest.content_sha256)
    assert result["train"]["documents"] == manifest.train.documents
    other = psannlm(*arguments, "--val-split", "0.3")
    assert other.code == 2
    assert "val_split: 0.2 then, 0.3 now" in other.err


@pytest.mark.slow
def test_prep_and_load_corpus_print_the_same_tokens(
    psannlm: Run, tiny_corpus: Path, tokenizer: Path, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    arguments = [str(tiny_corpus), "--per-line", "--tokenizer", str(tokenizer), "--out", str(tmp_path / "out")]
    made = psannlm("prep", *arguments, "--val-split", "0")
    (row,) = (line.split("│") for line in made.out.splitlines() if line.startswith("│ train"))
    logged.clear()
    source = PathSource(path=str(tiny_corpus), per_line=True)
    for sources in ((source,), (PathSource(path=str(tmp_path / "out")),)):
        load_corpus(DataConfig(sources=sources, tokenizer_model_path=str(tokenizer), val_split=0, max_length=8))
    counts = [line.split(" bytes, ")[1].split(" tokens")[0] for line in logged.messages if line.startswith("train: ")]
    manifest = read_manifest(tmp_path / "out")
    assert counts == [row[4].strip()] * 2 == [f"{manifest.train.tokens - manifest.train.documents:,}"] * 2


@pytest.mark.slow
def test_the_printed_next_command_can_be_pasted(
    psannlm: Run, tiny_corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "o:100:x" / "- it's [red], {b}: #c & ~ *d"
    made = psannlm("prep", str(tiny_corpus), "--per-line", "--tokenizer", str(tokenizer), "--out", str(out))
    assert made.code == 0, made.err
    assert any(f" {out} " in line for line in made.out.splitlines()), "printed as it is, in one line"
    printed = made.out.splitlines()[-1].removeprefix("next, with your configuration file for CONFIG: ")
    words = shlex.split(printed)
    assert words[:3] == ["psannlm", "train", "CONFIG"]
    assert words[-2:] == ["--out", f"runs/{out.name}"]
    overrides = [word for word, option in zip(words[4::2], words[3::2], strict=True) if option == "--set"]
    (tmp_path / "config.yaml").write_text("data: {sources: [x.txt]}\n", encoding="utf-8")
    data = load_config(tmp_path / "config.yaml", overrides).data
    assert data.val_split == 0
    assert [source.path for source in data.sources if isinstance(source, PathSource)] == [str(out)]
    # In a clone the line is whole.
    shutil.copytree(Path(__file__).parents[2] / "configs", tmp_path / "configs")
    again = psannlm("prep", str(tiny_corpus), "--per-line", "--tokenizer", str(tokenizer), "--out", str(out))
    pasted = psannlm(*shlex.split(again.out.splitlines()[-1].removeprefix("next: "))[1:], "--dry-run")
    assert pasted.code == 0, pasted.err


@pytest.mark.slow
def test_parts_and_merge(psannlm: Run, tiny_texts: list[str], tokenizer: Path, tmp_path: Path) -> None:
    for number, text in enumerate(tiny_texts):
        (tmp_path / f"{number}.txt").write_text(text)
    folders = [str(tmp_path / f"part{number}") for number in (1, 2)]
    for number, folder in enumerate(folders, start=1):
        corpus, part = str(tmp_path / "*.txt"), f"{number}/2"
        made = psannlm("prep", corpus, "--tokenizer", str(tokenizer), "--out", folder, "--part", part)
        assert made.code == 0
    merged = psannlm("prep", *folders, "--merge", "--out", str(tmp_path / "all"), "--json")
    assert json.loads(merged.out)["train"]["documents"] + 1 == len(tiny_texts)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "CORPUS"),
        (["x.txt"], "--out"),
        (["x.txt", "--out", "o"], "--tokenizer"),
        (["x.txt", "--out", "o", "--tokenizer", "t", "--part", "one"], "--part"),
        (["x.txt", "--out", "o", "--tokenizer", "t", "--val-split", "2"], "--val-split"),
        (["x.txt", "--out", "o", "--tokenizer", "t", "--errors", "ignore"], "--errors"),
    ],
)
def test_prep_wrong_usage_names_the_option(psannlm: Run, tokenizer: Path, arguments: list[str], said: str) -> None:
    result = psannlm("prep", *(str(tokenizer) if word == "t" else word for word in arguments))
    assert result.code == 2
    assert said in result.err


@pytest.mark.slow
def test_errors_are_one_line(psannlm: Run, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    result = psannlm("prep", str(tmp_path / "a.txt"), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "out"))
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    missing = psannlm("prep", str(tmp_path / "b.txt"), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "out"))
    assert missing.code == 2
    assert "b.txt: no such file or folder" in missing.err

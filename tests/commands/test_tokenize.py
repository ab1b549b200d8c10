"""psannlm tokenize: fit and look."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_a_fitted_file_shows_the_text_it_is_given(psannlm, project: Path) -> None:
    card = json.loads(
        psannlm("tokenize", "corpus.txt", "--per-line", "--vocab-size", "300", "--out", "t", "--json").out
    )
    assert card["held_out_is_lossless"] is True
    assert Path(card["file"]).is_file()
    assert json.loads(Path(card["card"]).read_text())["fingerprint"] == card["fingerprint"]
    text = "The </s> tide  é"
    [row] = json.loads(psannlm("tokenize", "--model", card["file"], "--text", text, "--json").out)
    assert row["text"] == text
    assert len(row["ids"]) == len(row["pieces"]) > 3
    assert not {0, 1, 2, 3} & set(row["ids"])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["corpus.txt", "--model", "x.model"],
        ["--model", "x.model"],
        ["--model", "x", "--text", "a", "--stdin"],
        ["corpus.txt", "--text", "a"],
        ["corpus.txt", "--stdin"],
        ["--model", "x", "--text", "a", "--out", "y"],
    ],
)
def test_contradictory_usage_is_refused(psannlm, project: Path, arguments: list[str]) -> None:
    assert psannlm("tokenize", *arguments).code == 2


def test_a_small_corpus_gets_a_smaller_vocabulary_and_a_notice(psannlm, project: Path) -> None:
    done = psannlm("tokenize", "corpus.txt", "--per-line", "--vocab-size", "5000", "--json", "--out", "t.model")
    assert done.code == 0
    assert json.loads(done.out)["vocab_size"] < 5000
    assert "5,000" in done.err


def test_each_line_of_stdin_is_answered_as_it_comes(psannlm, project: Path) -> None:
    psannlm("tokenize", "corpus.txt", "--backend", "simple", "--vocab-size", "300", "--out", "t.json")
    command = [sys.executable, "-m", "psannlm", "tokenize", "--model", "t.json", "--stdin"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, encoding="utf-8", **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for text, n_ids in (("ab", 2), ("a\u2028b\x0c", 6), ("", 0)):
            process.stdin.write(text + "\n")
            process.stdin.flush()
            assert len(process.stdout.readline().split()) == n_ids
        process.stdin.write("abc")
        rest, _ = process.communicate(timeout=30)
    assert [len(line.split()) for line in rest.splitlines()] == [3]
    piped = subprocess.run([*command, "--json"], input="a\u2028b\nc", stdout=subprocess.PIPE, encoding="utf-8")
    assert [row["text"] for row in json.loads(piped.stdout)] == ["a\u2028b", "c"]


def test_another_tokenizer_is_not_overwritten(psannlm, project: Path) -> None:
    fit = ("tokenize", "corpus.txt", "--per-line", "--backend", "simple", "--out", "t.json")
    assert psannlm(*fit).code == 0
    before = Path("t.json").read_bytes()
    assert psannlm(*fit).code == 0  # the same one again
    Path("corpus.txt").write_text("Éèê\nàâ\nüö\nñ and more\n", encoding="utf-8")
    refused = psannlm(*fit)
    assert refused.code == 2
    assert "--out" in refused.err
    assert Path("t.json").read_bytes() == before

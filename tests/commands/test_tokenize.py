"""psannlm tokenize: fit and look."""

from __future__ import annotations

import gzip
import io
import json
import shlex
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
        ["--model", "t.json", "--file", "corpus.txt"],
        ["--model", "t.json", "--text", "a"],
        ["--model", "t.json", "--text", "a", "--json"],
        ["corpus.txt", "--backend", "simple", "--vocab-size", "300", "--out", "t.json"],
    ],
)
def test_output_that_is_lost_is_named_and_no_file(
    psannlm, project: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    made = psannlm("tokenize", "corpus.txt", "--backend", "simple", "--vocab-size", "300", "--out", "t.json")
    assert made.code == 0
    full = open("/dev/full", "w", encoding="utf-8")
    with full, monkeypatch.context() as patch:
        for stream, reason in ((None, "closed"), (full, "no space left on device")):
            patch.setattr(sys, "stdout", stream)
            done = psannlm("tokenize", *arguments)
            assert done.code == 1
            assert done.err.splitlines()[-1] == f"error: standard output: {reason}; its output is lost"
            assert "Traceback" not in done.err


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
        ["--model", "x", "--text", "a", "--file", "b"],
        ["--model", "x", "--jsonl", "--json"],
        ["corpus.txt", "--decode"],
        ["corpus.txt", "--jsonl"],
        ["corpus.txt", "--model-type", "bep"],
    ],
)
def test_contradictory_usage_is_refused(psannlm, project: Path, arguments: list[str]) -> None:
    assert psannlm("tokenize", *arguments).code == 2


def test_tokenize_small_corpus_shrinks_the_vocabulary_with_a_notice(psannlm, project: Path) -> None:
    done = psannlm("tokenize", "corpus.txt", "--per-line", "--vocab-size", "5000", "--json", "--out", "t.model")
    assert done.code == 0
    assert json.loads(done.out)["vocab_size"] < 5000
    assert "5,000" in done.err


@pytest.mark.slow
def test_each_line_of_stdin_is_answered_as_it_comes(psannlm, project: Path) -> None:
    psannlm("tokenize", "corpus.txt", "--backend", "simple", "--vocab-size", "300", "--out", "t.json")
    command = [sys.executable, "-m", "psannlm", "tokenize", "--model", "t.json", "--stdin"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, encoding="utf-8", **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for text, n_ids in (("ab", 3), ("a\u2028b\x0c", 7), ("", 1)):  # each with the id of its newline
            process.stdin.write(text + "\n")
            process.stdin.flush()
            assert len(process.stdout.readline().split()) == n_ids
        process.stdin.write("abc")
        rest, _ = process.communicate(timeout=30)
    assert [len(line.split()) for line in rest.splitlines()] == [3]
    piped = subprocess.run([*command, "--json"], input="a\u2028b\nc", stdout=subprocess.PIPE, encoding="utf-8")
    assert [row["text"] for row in json.loads(piped.stdout)] == ["a\u2028b\n", "c"]


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


TRICKY = "one\r\n two  \n\n\ttabs\u2028\ufeff </s> 1:2 ▁ 日本\n\x0bno end"


@pytest.fixture
def fitted(psannlm, project: Path) -> str:
    psannlm("tokenize", "corpus.txt", "--per-line", "--vocab-size", "300", "--out", "t.model")
    Path("tricky.txt").write_bytes(TRICKY.encode())
    return f"{shlex.quote(sys.executable)} -m psannlm tokenize --model t.model"


def shell(line: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("ids", ["", "--ids"])
def test_tokenize_shell_pipeline_round_trips_every_byte(fitted: str, ids: str) -> None:
    done = shell(f"{fitted} --stdin {ids} <tricky.txt | {fitted} --decode")
    assert (done.stdout, done.stderr, done.returncode) == (TRICKY.encode(), b"", 0)


@pytest.mark.slow
def test_tokenize_jsonl_pipeline_round_trips_text_and_keys(fitted: str) -> None:
    records = [{"n": 1, "text": TRICKY, "z": [None, "\ud800"]}, {"text": ""}]
    Path("in.jsonl").write_text("\n\n".join(map(json.dumps, records)) + "\n")
    done = shell(f"{fitted} --jsonl --file in.jsonl | tee ids.jsonl | {fitted} --decode --jsonl")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == records
    first = json.loads(Path("ids.jsonl").read_text().splitlines()[0])
    assert list(first) == ["n", "ids", "z"], "in the order they came"


@pytest.mark.slow
def test_tokenize_ends_quietly_when_its_reader_closes(fitted: str) -> None:
    Path("long.txt").write_text("a line\n" * 50_000)
    done = shell(f"{fitted} --file long.txt | head -n 1")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"\n") == 1


@pytest.mark.slow
def test_tokenize_stream_answers_lines_before_a_bad_one(fitted: str) -> None:
    for options, given, answered, says in (
        ("--jsonl", b'{"text": "a"}\n{"txet": 1}\n', 1, b"line 2: no key 'text' among 'txet' (did you mean 'txet'?)"),
        ("--stdin", b"fine\nn\xffo\n", 1, b"stdin: line 2: byte 2 is 0xFF, which is not UTF-8"),
        ("--file given", b"fine\nn\xffo\n", 1, b"given: line 2: byte 2 is 0xFF, which is not UTF-8"),
        ("--decode", b"260\n9999\n", 0, b"line 2: id 9999 is outside the vocabulary"),
    ):
        Path("given").write_bytes(given)
        done = shell(f"{fitted} {options} <given")
        assert done.returncode == 1
        assert says in done.stderr, done.stderr
        assert done.stdout.count(b"\n") == answered


def test_tokenize_prints_card_as_table_and_reading_progress(psannlm, project: Path) -> None:
    done = psannlm("tokenize", "corpus.txt", "--per-line", "--model-type", "bpe", "--vocab-size", "300", "--out", "b")
    assert done.code == 0, done.err
    for words in (
        "sentencepiece, bpe",
        "bytes per token",
        "byte fallback",
        "exact",
        "longest pieces",
        "b.model.card.json",
    ):
        assert words in done.out
    assert "fitting sentencepiece (bpe) on" in done.err
    assert Path("b.model").is_file()
    assert Path("b.model.card.json").is_file()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_tokenize_compressed_file_round_trips(psannlm, project: Path, suffix: str) -> None:
    """The ids of its lines are those of the plain file's; one that is cut short is an error and not a shorter text."""
    text = "The tide é\n\nrises\r\nand falls".encode()
    Path("plain.txt").write_bytes(text)
    packed = gzip.compress(text) if suffix == ".gz" else pytest.importorskip("zstandard").compress(text)
    Path(f"packed.txt{suffix}").write_bytes(packed)
    card = json.loads(psannlm("tokenize", "corpus.txt", "--vocab-size", "300", "--out", "t", "--json").out)
    model = ("tokenize", "--model", card["file"], "--file")
    plain = psannlm(*model, "plain.txt").out
    assert len(plain.splitlines()) == 4
    assert psannlm(*model, f"packed.txt{suffix}").out == plain
    Path(f"packed.txt{suffix}").write_bytes(packed[:-3])
    cut = psannlm(*model, f"packed.txt{suffix}")
    assert cut.code == 2
    assert f"packed.txt{suffix}: damaged or cut short" in cut.err
    missing = psannlm(*model, f"other.txt{suffix}")
    assert missing.code == 2
    assert f"other.txt{suffix}" in missing.err


@pytest.mark.slow
def test_files_and_standard_input_are_read_alike(psannlm, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    psannlm("tokenize", "corpus.txt", "--backend", "simple", "--vocab-size", "300", "--out", "t.json")
    mark = b"\xef\xbb\xbf"
    for option, content in (("--ids", b"a\nb\n"), ("--decode", b"101 102\n103\n"), ("--jsonl", b'{"text": "a"}\n')):
        answers = set()
        for given in (content, mark + content, gzip.compress(content)):
            Path("given").write_bytes(given)
            for source in (["--file", "given"], ["--file", "-"], ["--stdin"]):
                monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
                done = psannlm("tokenize", "--model", "t.json", option, *source)
                assert done.code == 0, done.err
                answers.add(done.out)
        assert len(answers) == 1
        for given, said in ((content.decode().encode("utf-16"), "UTF-16"), (bytes(99), "binary data")):
            Path("given").write_bytes(given)
            for source in ("given", "-"):
                monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
                done = psannlm("tokenize", "--model", "t.json", option, "--file", source)
                assert done.code == 2
                assert f"is {said}" in done.err


def test_errors_are_replaced_with_the_option_that_is_named(psannlm, project: Path) -> None:
    psannlm("tokenize", "corpus.txt", "--backend", "simple", "--vocab-size", "300", "--out", "t.json")
    Path("bad.txt").write_bytes(b"caf\xe9\n")
    Path("bad.jsonl").write_text('{"text": "a \\ud83d"}\n{"text": "two"}\n')
    for arguments in (
        ["bad.jsonl", "--backend", "simple", "--vocab-size", "300", "--out", "u.json"],
        ["--model", "t.json", "--file", "bad.txt", "--ids"],
        ["--model", "t.json", "--file", "bad.jsonl", "--jsonl"],
    ):
        refused = psannlm("tokenize", *arguments)
        assert refused.code in (1, 2)
        assert "--errors replace" in refused.err
        assert psannlm("tokenize", *arguments, "--errors", "replace").code == 0


def test_a_line_without_end_is_refused_by_its_number(psannlm, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    psannlm("tokenize", "corpus.txt", "--backend", "simple", "--vocab-size", "300", "--out", "t.json")
    monkeypatch.setattr("psannlm.data.corpus.reading.MAX_LINE_BYTES", 1 << 16)
    Path("a.txt.gz").write_bytes(gzip.compress(b"fine\n" + b"x" * (1 << 20)))
    for arguments in (["a.txt.gz", "--per-line", "--out", "u"], ["--model", "t.json", "--file", "a.txt.gz", "--ids"]):
        refused = psannlm("tokenize", *arguments)
        assert refused.code == 2
        assert "a.txt.gz:2: a line of more than" in refused.err
        assert "batch_tokens" not in refused.err

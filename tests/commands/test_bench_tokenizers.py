"""psannlm bench-tokenizers: figures, files, and a person's own tokenizers beside the fitted ones."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psannlm.benchmarks.tokenization import bench as bench
from psannlm.benchmarks.tokenization import prep

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY = ("--corpus", "corpus.txt", "--per-line", "--vocab-size", "300", "--repeat", "1")


class Here:
    """An object in this process, in the place of one in a process of its own, which takes a second to start."""

    def __init__(self, build: Callable[..., Any], *arguments: Any, environment: Any = None) -> None:
        self._target = build(*arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._target, method)(*arguments)

    def close(self) -> None:
        pass

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in this process: the benchmark's own tests start those that it measures in."""
    monkeypatch.setattr(bench, "IsolatedProcess", Here)
    monkeypatch.setattr(prep, "IsolatedProcess", Here)


@pytest.mark.slow
def test_bench_tokenizers_prints_and_writes_figures(psannlm, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # figures of many digits, on a slow machine, would break the names
    monkeypatch.setattr(bench, "KINDS", {name: bench.KINDS[name] for name in ("byte-level bpe", "characters")})
    psannlm(
        "tokenize", "corpus.txt", "--per-line", "--backend", "simple", "--vocab-size", "300", "--out", "[/own].json"
    )
    done = psannlm("bench-tokenizers", *TINY, "--model", "[/own].json")
    assert done.code == 0, done.err
    [folder] = Path("reports/tokenizers").iterdir()
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "system.json", "table.txt", "tokenizers.png"}
    rows = json.loads((folder / "metrics.json").read_text())["tokenizers"]
    assert [row["name"] for row in rows] == [
        "byte-level bpe",
        "characters",
        "[/own].json",
    ]
    assert rows[1]["bytes_per_token"] == rows[2]["bytes_per_token"] == 1.0, "one byte a character, one id a byte"
    assert all(row["is_lossless"] for row in rows)
    assert [row["one_thread"]["ratio_to_raw"] is None for row in rows] == [False, True, True]
    table = (folder / "table.txt").read_text()
    for words in ("characters", "[/own].json", "bytes per token", "lossless", "one thread", "all threads", "of raw"):
        assert words in table
        assert words in done.out
    assert (folder / "tokenizers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_bench_tokenizers_accepts_held_out_text(psannlm, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "KINDS", {"characters": ("simple", None)})
    Path("other.txt").write_text("Übung macht den Meister.\n", encoding="utf-8")
    done = psannlm("bench-tokenizers", *TINY, "--held-out", "other.txt", "--out", "here", "--json")
    metrics = json.loads(done.out)
    assert metrics["folder"] == "here"
    # The end of the line belongs to no document when each line is one.
    assert metrics["held_out"]["bytes"] == len("Übung macht den Meister.".encode())
    assert metrics["held_out"]["overlap"] == 0
    assert metrics["corpus"] == ["corpus.txt"]


@pytest.mark.slow
def test_bench_tokenizers_times_prep(psannlm, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {name: bench.KINDS[name] for name in ("sentencepiece unigram", "byte-level bpe")}
    monkeypatch.setattr(bench, "KINDS", kinds)
    done = psannlm("bench-tokenizers", *TINY, "--prep", "--out", "here")
    assert done.code == 0, done.err
    rows = json.loads(Path("here/metrics.json").read_text())["prep"]
    assert [row["name"] for row in rows] == ["sentencepiece unigram", "byte-level bpe"]
    assert all(row["extra_tokens"] == 0 for row in rows), "the same text on both sides"
    assert [row["ratio_to_raw_arrays"] is None for row in rows] == [False, True]
    for words in ("psannlm prep on all", "library, MB/s", "prep / library", "extra tokens"):
        assert words in Path("here/table.txt").read_text()


@pytest.mark.slow
def test_bench_tokenizers_times_prep_on_ray(psannlm, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(bench, "KINDS", {"byte-level bpe": bench.KINDS["byte-level bpe"]})
    n_tokens: dict[str, set[int]] = {}
    run_prep = prep.run_prep

    def noting(sources: Any, tokenizer: bytes, workers: int, engine: str = "local") -> prep.PrepRun:
        made = run_prep(sources, tokenizer, workers, engine)
        n_tokens.setdefault(engine, set()).add(made.n_tokens)
        return made

    monkeypatch.setattr(prep, "run_prep", noting)
    done = psannlm("bench-tokenizers", *TINY, "--prep", "--engine", "ray", "--out", "here")
    assert done.code == 0, done.err
    assert n_tokens["ray"] == n_tokens["local"], "of the corpus, and of one line"
    (row,) = json.loads(Path("here/metrics.json").read_text())["prep"]
    assert row["ray"].keys() >= {"prep_s", "start_s", "ratio_to_local"}
    for words in ("with Ray, MB/s", "Ray / local", "Ray's start, s"):
        assert words in Path("here/table.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--corpus", "nowhere.txt"], 2, "nowhere.txt"),
        (["--prep"], 2, "give a --corpus"),
        ([*TINY, "--vocab-size", "10"], 2, "vocab_size 10 is too small"),
        ([*TINY, "--model", "nowhere.model"], 2, "nowhere.model"),
        ([*TINY, "--repeat", "0"], 2, "--repeat"),
    ],
)
def test_bench_tokenizers_refuses_unusable_options(
    psannlm, project: Path, arguments: list[str], code: int, words: str
) -> None:
    done = psannlm("bench-tokenizers", *arguments)
    assert done.code == code
    assert words in done.err
    assert not Path("reports").exists()


@pytest.mark.parametrize(
    ("script", "command"), [("compare_tokenizers", "bench-tokenizers"), ("benchmark_kv_cache", "bench-kv")]
)
def test_compare_tokenizers_script_forwards(
    script: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    assert not ended.value.code
    assert f"psannlm {command}" in capsys.readouterr().out

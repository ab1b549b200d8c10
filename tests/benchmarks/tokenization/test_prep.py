"""Prep benchmark: both sides encode the same text, known values, and memory of all processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from psannlm.benchmarks.tokenization import prep as prep_module
from psannlm.benchmarks.tokenization.prep import (
    PrepRun,
    RawBench,
    RawRun,
    bench_prep,
    check_preparable,
    held_bytes,
    run_prep,
)
from psannlm.config.data import BuiltinSource, PathSource
from psannlm.errors import ConfigError, WorkerError
from psannlm.reports.schemas.measured import Spread
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import fit_tokenizer

TEXTS = ["Übung macht den Meister.\n", "das Ei\n", "Übung macht den Meister.\n"]


@pytest.fixture
def corpus(tmp_path: Path) -> PathSource:
    lines = [json.dumps({"body": text}) for text in TEXTS]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return PathSource(path=str(tmp_path / "texts.jsonl"), text_key="body")


@pytest.fixture(scope="module", params=["sentencepiece", "tokenizers"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return fit_tokenizer(TEXTS * 20, request.param, vocab_size=280)


@pytest.mark.slow
def test_bench_prep_encodes_all_text_on_both_sides(corpus: PathSource, tokenizer: Tokenizer) -> None:
    expected = sum(len(tokenizer.encode(text)) for text in TEXTS)
    raw = RawBench([corpus], tokenizer.to_bytes(), 1)
    ways = [False, True] if raw.has_arrays() else [False]
    assert raw.has_arrays() == (tokenizer.backend == "sentencepiece")
    for as_arrays in ways:
        made = raw.run(as_arrays)
        assert (made.n_tokens, made.n_bytes) == (expected, sum(len(text.encode()) for text in TEXTS))
    # Equal documents and all: one that prep left out would make it look fast.
    assert run_prep([corpus], tokenizer.to_bytes(), 1).n_tokens == expected


def test_bench_prep_skips_arrays_where_unsupported(corpus: PathSource) -> None:
    tokenizer = fit_tokenizer(TEXTS, "tokenizers", vocab_size=280)
    with pytest.raises(ConfigError, match="the tokenizers backend has no raw encoding"):
        RawBench([corpus], tokenizer.to_bytes(), 1).run(as_arrays=True)


def test_prep_figures_known_values() -> None:
    prep = [PrepRun(4.0, 7.0, 100, 50), PrepRun(5.0, 8.0, 100, 70), PrepRun(10.0, 9.0, 100, None)]
    raw = [RawRun(2.0, 3.0, 98, 8_000_000), RawRun(10.0, 3.5, 98, 8_000_000), RawRun(9.0, 4.0, 98, 8_000_000)]
    figures = prep_module._figures("mine", 2, prep, raw, None)
    assert figures.ratio_to_raw == Spread(0.9, 0.5, 2.0)
    assert (figures.n_tokens, figures.extra_tokens, figures.peak_bytes) == (100, 2, 70)
    assert figures.as_dict()["prep_mb_per_s"] == 8 / 5
    assert figures.as_dict()["raw_mb_per_s"] == 8 / 9
    assert figures.prep_cpu_s.median == 8.0
    assert figures.ratio_to_raw_arrays is None


def test_check_preparable_refuses_mixed_sources() -> None:
    a, b = PathSource(path="a.jsonl"), PathSource(path="b.jsonl", text_key="body")
    assert check_preparable([a, a]) == [a, a]
    with pytest.raises(ConfigError, match="per_line and text_key must be equal"):
        check_preparable([a, b])
    with pytest.raises(ConfigError, match="not the built-in corpus"):
        check_preparable([a, BuiltinSource(builtin="python-reference")])


@pytest.mark.slow
def test_run_prep_failure_raises(tmp_path: Path) -> None:
    tokenizer = fit_tokenizer(TEXTS, "tokenizers", vocab_size=280)
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(WorkerError, match=r"ended with exit code 2: .*0xE9"):
        run_prep([PathSource(path=str(tmp_path / "bad.txt"))], tokenizer.to_bytes(), 1)


def test_bench_prep_skips_character_tokenizer(corpus: PathSource) -> None:
    assert bench_prep({"characters": fit_tokenizer(TEXTS, "simple", vocab_size=280)}, [corpus], repeats=1) == []


def test_held_bytes_include_child_processes() -> None:
    if held_bytes(1 << 30) is None:
        pytest.skip("this system does not tell what a process holds")
    hold = "import sys, time; held = bytearray(b'x') * (64 << 20); print('there', flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        held = held_bytes(process.pid)
        process.communicate("")
    assert held is not None
    assert 64 << 20 < held < 128 << 20
    deadline = time.monotonic() + 10
    while held_bytes(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert held_bytes(process.pid) == 0, "what has ended holds nothing"

"""psannlm bench-train: figures, files, and a clear line for what cannot be measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TINY = ("--d-model", "16", "--n-layers", "1", "--n-heads", "2", "--vocab-size", "50", "--seq-len", "8")
TINY += ("--batch-tokens", "32", "--repeats", "1", "--steps", "1", "--device", "cpu", "--amp", "fp32", "--no-memory")


@pytest.mark.slow
def test_bench_train_prints_and_writes_figures(psannlm, project: Path) -> None:
    done = psannlm("bench-train", *TINY, "--also", "gelu", "--also", "grad-checkpoint")
    assert done.code == 0, done.err
    [folder] = Path("reports/throughput").iterdir()
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "system.json", "table.txt", "throughput.png"}
    metrics = json.loads((folder / "metrics.json").read_text())
    names = ["waveresnet", "waveresnet with GELU", "waveresnet with checkpointing"]
    assert [row["name"] for row in metrics["rows"]] == names
    for key in ("timestamp", "base", "batch_tokens", "tokens_per_s", "utilisation", "peak_bytes", "parameters"):
        assert all(key in row for row in metrics["rows"])
    table = (folder / "table.txt").read_text()
    for words in (*names, "matrix peak", "cost of the sine vs GELU, plain", "our parameters"):
        assert words in done.out
        assert words in table
    assert "psannlm" in json.loads((folder / "system.json").read_text())
    assert (folder / "throughput.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_bench_train_json_is_all_of_stdout(psannlm, project: Path) -> None:
    done = psannlm("bench-train", *TINY, "--base", "transformer", "--out", "here", "--json", "--clock", "cpu")
    metrics = json.loads(done.out)
    assert (metrics["folder"], metrics["clock"]) == ("here", "cpu")
    assert metrics["rows"][0]["mlp"] == "swiglu"


@pytest.mark.slow
def test_bench_train_measures_memory_in_own_process(psannlm, project: Path) -> None:
    arguments = [argument for argument in TINY if argument != "--no-memory"]
    [row] = json.loads(psannlm("bench-train", *arguments, "--d-model", "128", "--json").out)["rows"]
    assert row["peak_bytes"] is None or row["peak_bytes"] > 16 * row["parameters"] * 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-tokens", "4"), "batch_tokens 4 is too small; use 8"),
        (("--also", "glu"), "--also 'glu' is not one of"),
        (("--n-heads", "3"), "--n-heads: 3 heads do not divide d_model 16"),
    ],
)
def test_bench_train_invalid_options_exit_2(psannlm, project: Path, arguments: tuple[str, ...], message: str) -> None:
    done = psannlm("bench-train", *TINY, *arguments)
    assert done.code == 2
    assert message in done.err

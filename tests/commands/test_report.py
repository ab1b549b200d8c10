"""psannlm report: the page of a trained run, and refused usage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.mark.slow
def test_report_command_writes_page_of_a_run(
    psannlm, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    done = psannlm("report", "--json", "--out", str(tmp_path / "page"))
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert (told["runs"], told["left_out"]) == (1, [])
    names = {path.name for path in (tmp_path / "page").iterdir()}
    assert names >= {
        "throughput.csv",
        "memory.json",
        "metrics.csv",
        "metrics.json",
        "loss_curve.png",
        "report.md",
        "report.html",
        "system.json",
    }
    (run,) = json.loads((tmp_path / "page" / "metrics.json").read_text())["runs"]
    rows = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert run["val_loss"] == min(row["loss"] for row in rows if row["kind"] == "eval")
    assert run["train_loss"] == [row["loss"] for row in rows if row["kind"] == "train"][-1]
    assert run["corpus"] == "corpus.txt"
    assert run["parameters"] > 1000


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 1, "nothing to report"),
        (["--since", "soon"], 2, "'soon' is not a time"),
        (["--kind", "throughputs"], 2, "there is no reports/throughputs"),
        (["--compare", "a"], 2, "two run folders"),
        (["--compare", "a", "b"], 2, "a is not a run folder"),
        (["--compare", "a", "b", "--kind", "gpu"], 2, "no --runs, --kind or --since"),
        (["a"], 2, "--runs"),
    ],
)
def test_report_command_rejects_wrong_usage(
    psannlm, project: Path, arguments: list[str], code: int, words: str
) -> None:
    done = psannlm("report", *arguments)
    assert done.code == code
    assert words in done.err
    assert not Path("reports").exists()


@pytest.mark.slow
def test_report_command_includes_records_of_tokenize_and_prep(psannlm, project: Path) -> None:
    assert psannlm("tokenize", "corpus.txt", "--per-line", "--backend", "simple", "--vocab-size", "300").code == 0
    assert psannlm("prep", "corpus.txt", "--per-line", "--tokenizer", "tokenizer.json", "--out", "prepared").code == 0
    assert psannlm("train", "config.yaml").code == 0
    for folder in ("tokenizer.json.record", "prepared", "runs/tiny"):
        for name in ("metrics.json", "system.json", "table.txt"):
            assert (Path(folder) / name).is_file(), f"{folder}/{name}"
    done = psannlm("report", "--out", "page", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert (told["runs"], told["artifacts"], told["left_out"]) == (1, 2, [])
    [run] = json.loads(Path("page/metrics.json").read_text())["runs"]
    assert run["epochs"] > 0
    again = psannlm("prep", "corpus.txt", "--per-line", "--tokenizer", "tokenizer.json", "--out", "prepared")
    assert "is prepared already" in again.out

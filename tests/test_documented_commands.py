"""Commands as the documents print them, run from a folder like a fresh clone."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from psannlm.benchmarks.harness import roofline
from psannlm.benchmarks.tokenization import bench
from psannlm.commands.app import main
from psannlm.config.run import load_config
from psannlm.gpu_suite import suite

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The folders of a clone that the documented commands name; what they write stays in it."""
    for name in ("examples", "configs", "scripts"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(folder: Path, line: str, timeout_s: float = 600, **variables: str) -> str:
    """Run a printed command with this Python; return stdout and stderr. A non-zero exit code fails the test."""
    words = shlex.split(line)
    words = [sys.executable, *words[1:]] if words[0] == "python" else words
    if words[0] == "psannlm":
        words = [sys.executable, "-m", "psannlm", *words[1:]]
    environment = {**os.environ, "COLUMNS": "200", **variables}
    ended = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout + ended.stderr


@pytest.fixture
def run_here(clone: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Return a function that does what ``run`` does in this process, which has torch loaded."""

    def run_line(line: str) -> str:
        program, *words = shlex.split(line)
        monkeypatch.chdir(clone)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        monkeypatch.setattr(sys, "argv", words)
        perform = (
            (lambda: runpy.run_path(words[0], run_name="__main__")) if program == "python" else lambda: main(words)
        )
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            perform()
        printed = capfd.readouterr()
        assert not ended.value.code, printed.err
        return printed.out + printed.err

    return run_line


@pytest.mark.slow
def test_cpu_quickstart_trains_within_seconds(clone: Path) -> None:
    said = run(clone, "python -m psann.lm.train.cli --config examples/lm/configs/waveresnet_cpu.yaml", timeout_s=120)
    assert "fp32 as asked" in said
    assert "all of the training text 40 times" in said
    config = load_config(clone / "runs/example_waveresnet_cpu/config.yaml")
    assert [str(getattr(source, "path", "")) for source in config.data.sources] == ["examples/lm/sample_texts.txt"]
    assert (config.train.amp, config.train.ddp) == ("fp32", "off")
    log = (clone / "runs/example_waveresnet_cpu/metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in log.splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[-1] < 0.5 < losses[0]


TINY = "examples/lm/configs/tiny_corpus_benchmark.yaml"


@pytest.mark.slow
def test_tiny_corpus_benchmark_states_its_fraction(clone: Path, run_here: Callable[[str], str]) -> None:
    run(clone, "python scripts/make_tiny_corpus.py --bytes 150000 --if-missing")
    smaller = "--set model.d_model=16 --set model.n_layers=1 --set model.n_heads=1 --set train.batch_tokens=4096"
    smaller += " --set train.device=cpu --set train.warmup_steps=2"
    said = run_here(f"psannlm train {TINY} {smaller} --max-steps 9 --set train.eval_interval_steps=9")
    plan = json.loads(run_here(f"psannlm train {TINY} {smaller} --dry-run --json").partition("\n}")[0] + "\n}")
    assert plan["steps_per_epoch"] > 9
    seen = 9 * plan["batches"]["micro_batch_size"] / plan["n_windows"]
    assert f"{seen:.1%} of the training text, once" in said


def test_tiny_corpus_benchmark_takes_one_epoch(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(clone, "python scripts/make_tiny_corpus.py --bytes 9000 --if-missing")
    monkeypatch.chdir(clone)
    config = load_config(TINY)
    assert [str(getattr(source, "path", "")) for source in config.data.sources] == ["datasets/lm/tiny_books.txt"]
    assert (config.train.epochs, config.train.max_steps) == (1, None)
    assert TINY in (REPOSITORY / "scripts/next_gpu_batch.sh").read_text(encoding="utf-8")


def only_folder(parent: Path) -> Path:
    [folder] = parent.iterdir()
    return folder


# The width and depth alone are smaller than in the printed command, which takes minutes.
KV = "python scripts/benchmark_kv_cache.py --batch-size 8 --prompt-length 96 --max-new-tokens 64"
KV_TINY = " --d-model 32 --n-layers 1 --n-heads 2 --vocab-size 64 --device cpu"


@pytest.mark.slow
def test_kv_cache_script_prints_and_stores_the_quotient(clone: Path, run_here: Callable[[str], str]) -> None:
    # Contexts up to 4,096 tokens, which it times too, are another law.
    said = run_here(KV + KV_TINY + " --no-context-growth")
    folder = only_folder(clone / "reports/kv_cache")
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert (metrics["is_complete"], metrics["generated_tokens"]) == (True, 512)
    assert (metrics["batch_size"], metrics["prompt_length"], metrics["max_new_tokens"]) == (8, 96, 64)
    rates = {row["name"]: row["tokens_per_s"]["median"] for row in metrics["cases"]}
    assert metrics["cached_tokens_per_s"]["median"] == rates["cache on, batch"]
    assert metrics["naive_tokens_per_s"]["median"] == rates["cache off, row by row"]
    assert metrics["cached_over_naive"]["median"] > 1
    assert {"cache_alone_in_batch", "batching_alone_with_cache"} <= set(metrics["speedup_of_decoding"])
    words = ("512 in a run", "cached over naive", "naive, row by row", "cache alone", "batching alone")
    for text in (said, (folder / "table.txt").read_text(encoding="utf-8")):
        assert [word for word in words if word not in text] == []


@pytest.mark.slow
def test_kv_cache_script_interrupted_leaves_its_measurements(clone: Path) -> None:
    words = [sys.executable, *shlex.split(KV + KV_TINY)[1:], "--repeats", "1000", "--no-context-growth"]
    with subprocess.Popen(words, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while not _has_counted_runs(clone / "reports/kv_cache") and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "written to" in out
    folder = only_folder(clone / "reports/kv_cache")
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["is_complete"] is False
    assert metrics["cached_over_naive"]["median"] > 1
    assert metrics["interrupted_in"]["n_runs"] > 4_000
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "system.json", "table.txt"}
    assert "cached over naive" in (folder / "table.txt").read_text(encoding="utf-8")


def _has_counted_runs(parent: Path) -> bool:
    for path in parent.glob("*/metrics.json"):
        cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
        return len(cases) == 4 and not any(case["is_warm_up"] for case in cases)
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "kinds"),
    [
        ("python scripts/compare_tokenizers.py --repeat 256", ("byte-level bpe", "characters")),
        (
            "python scripts/compare_tokenizers.py --corpus examples/lm/sample_texts.txt --repeat 256 --vocab-size 4096",
            ("characters",),
        ),
    ],
)
def test_tokenizer_script_repeats_the_corpus(
    line: str, kinds: tuple[str, ...], clone: Path, run_here: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each kind has a column of its own and takes ten processes; SentencePiece trains on this much text for seconds.
    monkeypatch.setattr(bench, "KINDS", {name: bench.KINDS[name] for name in kinds})
    said = run_here(line)
    folder = only_folder(clone / "reports/tokenizers")
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["corpus"] == ["examples/lm/sample_texts.txt"]
    assert (metrics["vocab_size"], metrics["repeats"]) == (4096, 3)
    held_out = metrics["held_out"]
    assert (held_out["repeat"], held_out["passages"] % 256, held_out["overlap"]) == (256, 0, 0)
    # The characters of the two sides together are the corpus, 256 times.
    n_chars = sum(map(len, (clone / "examples/lm/sample_texts.txt").read_text(encoding="utf-8").splitlines()))
    assert metrics["tokenizers"][0]["n_chars"] + metrics["fitted_on_chars"] == 256 * n_chars
    for row in metrics["tokenizers"]:
        assert row["tokens_per_char"] == row["n_tokens"] / row["n_chars"]
        assert row["encode_tokens_per_s"] == pytest.approx(row["n_tokens"] / row["encode_s"]["median"])
        assert row["fit_s"]["median"] >= 0
        assert row["model_bytes"] > 0
    words = (
        "held-out bytes (each passage 256 times)",
        "fit, s",
        "encode, s",
        "tokens/s",
        "tokens per char",
        "model size",
    )
    for text in (" ".join(said.split()), " ".join((folder / "table.txt").read_text(encoding="utf-8").split())):
        assert [word for word in words if word not in text] == []


@pytest.mark.slow
def test_gpu_validation_reports_are_dated_and_found(
    clone: Path, run_here: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The printed command on a CPU, for there may be no GPU, and with one batch size; then a check that takes less time.
    monkeypatch.setitem(roofline._EDGE, "cpu", 64)
    monkeypatch.setattr(suite, "DRY_RUN", replace(suite.DRY_RUN, batch_tokens=(512,), n_steps=4, repeats=1))
    for check in ("GPU-03", "GPU-01"):
        run_here(f"python scripts/run_gpu_validation.py --out reports/gpu --only {check} --device cpu")
    folders = list((clone / "reports/gpu").iterdir())
    assert len(folders) == 2
    assert all((folder / "summary.json").is_file() for folder in folders)
    written = json.loads(run_here("psannlm report --json").partition("\n}")[0] + "\n}")
    assert (written["artifacts"], written["left_out"]) == (2, [])


def test_benchmark_plan_names_targets_commands_and_artifacts() -> None:
    plan = (REPOSITORY / "benchmarks/lm_plan.md").read_text(encoding="utf-8")
    text = (REPOSITORY / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert "docs/benchmarks.md" in plan
    for target in ("BMRK-01", "BMRK-02", "BMRK-03"):
        assert target in plan
        [row] = [line for line in text.splitlines() if line.startswith(f"| **{target}**")]
        assert row.count("|") == 5
        for script in re.findall(r"(?:scripts|examples)/[\w/]+\.(?:py|yaml)", row):
            assert (REPOSITORY / script).is_file()
    assert "KVFAST-01" in text
    assert "TEST-03" in text

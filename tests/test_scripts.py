"""The scripts of a pod: every step is recorded, none stops the others, and the exit code tells."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = REPOSITORY / "scripts"
# Ends as the test wants it to, by the name of its first argument, and notes what it was asked for.
FAKE = """#!/usr/bin/env bash
echo "$@" >>"$FAKE_LOG"
case "$1" in
{cases}
esac
"""


def run_batch(
    folder: Path, codes: dict[str, int], *arguments: str, **variables: str
) -> tuple[int, list[str], list[str]]:
    """Run the batch with a psannlm that ends as ``codes`` say; return its code, its steps, and what it asked for."""
    (folder / "scripts").mkdir(exist_ok=True)
    shutil.copy(SCRIPTS / "next_gpu_batch.sh", folder / "scripts")
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("psannlm", "python"):
        cases = "\n".join(f"  {command}) exit {code} ;;" for command, code in codes.items())
        (tools / name).write_text(FAKE.format(cases=cases), encoding="utf-8")
        (tools / name).chmod(0o755)
    log = folder / "asked.txt"
    log.unlink(missing_ok=True)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "FAKE_LOG": str(log), **variables}
    for name in ("OUT_DIR", "BENCH_OUT", "TINY_CONFIG", "TINY_DATA", "TINY_BUDGET"):
        if name not in variables:
            environment.pop(name, None)
    ended = subprocess.run(
        ["bash", str(folder / "scripts" / "next_gpu_batch.sh"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    steps = [path.read_text(encoding="utf-8").splitlines() for path in folder.rglob("steps.txt")]
    asked = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return ended.returncode, steps[0] if steps else [], asked


def test_gpu_batch_records_all_steps(tmp_path: Path) -> None:
    code, steps, asked = run_batch(tmp_path, {})
    assert code == 0
    assert len(steps) == 14
    assert all(" ok " in line for line in steps)
    assert asked[0].split()[0] == "gpu-validate"
    report, since, stamp, *others = asked[-1].split()
    assert (report, since) == ("report", "--since")
    assert others == ["--runs", f"runs/tiny_{stamp}", "--out", f"reports/benchmarks/{stamp}"]
    sizes = {line.split("--batch-tokens ")[1].split()[0] for line in asked if "--no-memory" in line}
    assert sizes == {"65536", "131072", "262144"}
    assert all("--device cuda" in line for line in asked if line.startswith(("gpu-validate", "bench-train")))


@pytest.mark.parametrize(
    ("codes", "code"),
    [({"gpu-validate": 3}, 3), ({"bench-train": 1}, 1), ({"gpu-validate": 3, "train": 1}, 1), ({"report": 2}, 1)],
    ids=str,
)
def test_gpu_batch_continues_after_failed_step(tmp_path: Path, codes: dict[str, int], code: int) -> None:
    ended, steps, asked = run_batch(tmp_path, codes)
    assert ended == code
    assert len(steps) == len(asked) == 14
    n_bad = sum(line.split()[0] in codes for line in asked)
    assert sum(" ok " not in line for line in steps) == n_bad


def test_gpu_batch_ends_on_interrupt(tmp_path: Path) -> None:
    ended, steps, asked = run_batch(tmp_path, {"bench-train": 130})
    assert ended == 130
    assert len(asked) == 2
    assert steps[-1].endswith("interrupted")


def test_gpu_batch_variables_set_output_paths(tmp_path: Path) -> None:
    variables = {"OUT_DIR": "a/gpu", "BENCH_OUT": "b", "TINY_CONFIG": "mine.yaml", "TINY_DATA": "c/books.txt"}
    ended, _, asked = run_batch(tmp_path, {}, **variables)
    assert ended == 0
    assert (tmp_path / "a" / "gpu" / "steps.txt").is_file()
    assert "gpu-validate --device cuda --out a/gpu" in asked
    assert asked[-1].startswith("report --since ")
    assert asked[-1].endswith(" --out b")
    [training] = [line for line in asked if line.startswith("train ")]
    assert training.startswith(
        "train mine.yaml --time-budget 10m --set data.sources=[{path: 'c/books.txt', per_line: true}]"
    )


@pytest.mark.parametrize("option", ["--dry-run", "--rehearse"])
def test_gpu_batch_dry_run_needs_no_gpu(tmp_path: Path, option: str) -> None:
    ended, _, asked = run_batch(tmp_path, {}, option, str(tmp_path / "kept"))
    assert ended == 0
    assert not any("cuda" in line for line in asked)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"reports"}


def test_gpu_batch_unknown_option_exits_2(tmp_path: Path) -> None:
    assert run_batch(tmp_path, {}, "--rehearsal")[0] == 2


@pytest.mark.parametrize("name", ["benchmark_kv_cache", "run_gpu_validation", "compare_tokenizers"])
def test_former_script_names_forward(name: str) -> None:
    ended = subprocess.run([sys.executable, SCRIPTS / f"{name}.py", "--help"], capture_output=True, text=True)
    assert ended.returncode == 0
    assert "--out" in ended.stdout


def test_make_tiny_corpus_writes_once(tmp_path: Path) -> None:
    def make(*arguments: str) -> str:
        command = [sys.executable, SCRIPTS / "make_tiny_corpus.py", "--bytes", "9000", "--out", path, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr

    path = tmp_path / "deep" / "books.txt"
    make()
    first = path.read_bytes()
    assert 8_500 < len(first) <= 9_000
    assert "is there already" in make("--seed", "2", "--if-missing")
    assert path.read_bytes() == first
    make("--seed", "2")
    assert path.read_bytes() != first


@pytest.mark.slow
def test_suite_script_writes_reports(tmp_path: Path) -> None:
    def run(out: str, *arguments: str) -> tuple[int, dict[str, object]]:
        command = [sys.executable, SCRIPTS / "run_cuda_tests.py", "--device", "cpu", "--out", tmp_path / out]
        ended = subprocess.run([*command, *arguments], capture_output=True, text=True)
        return ended.returncode, json.loads((tmp_path / out / "summary.json").read_text(encoding="utf-8"))

    code, summary = run("good", "tests/data/test_order.py")
    assert (code, summary["verdict"], summary["pytest_exit_code"]) == (0, "ok", 0)
    names = {path.name for path in (tmp_path / "good").iterdir()}
    assert names == {"pytest_report.json", "junit.xml", "system.json", "summary.json", "stdout.log"}
    assert "passed" in (tmp_path / "good" / "stdout.log").read_text(encoding="utf-8")
    code, summary = run("none", "tests/data/test_order.py", "-k", "nothing_is_called_so")
    assert (code, summary["verdict"], summary["pytest_exit_code"]) == (1, "failed", 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run_cuda_tests", "run_gpu_tests"])
def test_suite_script_without_gpu_exits_1(tmp_path: Path, name: str) -> None:
    command = [sys.executable, SCRIPTS / f"{name}.py", "--out", tmp_path / "out"]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: torch sees no GPU")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shell_scripts_are_clean() -> None:
    scripts = [*SCRIPTS.glob("*.sh"), REPOSITORY / ".ci" / "run"]
    ended = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.slow
def test_suite_script_runs_without_report_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    suite = importlib.import_module("suite")
    monkeypatch.setattr(suite, "PLUGIN", "a_plugin_that_is_not_installed")
    out = tmp_path / "reports" / "tests"
    arguments = ["--device", "cpu", "--out", str(out), "tests/data/test_order.py"]
    for n_folders in (1, 2):
        assert suite.run_suite("two runs", [], arguments, keeps_outputs=True) == 0
        assert len(list(out.iterdir())) == n_folders, "nothing is overwritten"
    for folder in out.iterdir():
        assert re.fullmatch(r"[0-9]{8}_[0-9]{6}(_[0-9])?", folder.name)
        names = {path.name for path in folder.iterdir()}
        assert names == {"junit.xml", "system.json", "summary.json", "stdout.log"}
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        assert summary["verdict"] == "ok"
        assert summary["counts"]["passed"] == summary["counts"]["total"] > 3


def test_suite_script_counts_every_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    suite = importlib.import_module("suite")
    report = tmp_path / "junit.xml"
    report.write_text('<testsuites><testsuite tests="9" failures="1" errors="2" skipped="3"/></testsuites>')
    assert suite._counts(report) == {"passed": 3, "total": 9, "failed": 1, "error": 2, "skipped": 3}
    assert suite._counts(tmp_path / "absent.xml") == {}


@pytest.mark.parametrize("arguments", [["--out", "reports/gpu"], ["--out=reports/gpu"]])
def test_gpu_validation_out_is_the_parent(arguments: list[str]) -> None:
    script = runpy.run_path(str(SCRIPTS / "run_gpu_validation.py"))
    command, *translated = script["translate"]([*arguments, "--only", "GPU-03"])
    assert command == "gpu-validate"
    assert re.fullmatch(r"--out[= ]reports/gpu/[0-9]{8}_[0-9]{6} --only GPU-03", " ".join(translated))

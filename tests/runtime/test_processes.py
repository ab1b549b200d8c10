"""Subprocesses import what the command imports, whatever the working folder contains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from psannlm.runtime.processes import import_path, python_command, python_program

# Libraries, ours and the standard one's, that a command or a process of its own imports late.
NAMES = (
    *("tokenize", "random", "colorsys", "json", "numpy", "torch", "yaml", "pydantic", "typer", "rich", "safetensors"),
    *("multiprocessing", "socket", "pickle", "psannlm", "sitecustomize", "usercustomize", "typing", "statistics"),
    *("tempfile", "subprocess", "matplotlib", "sentencepiece", "tokenizers", "ctypes", "logging", "pathlib", "csv"),
)
CONFIG = """\
model: {base: waveresnet, d_model: 16, n_layers: 1, n_heads: 2}
data:
  {sources: [{path: corpus.txt, per_line: true}], tokenizer: simple, vocab_size: 300, max_length: 16, val_split: 0.2}
train: {max_steps: 2, batch_tokens: 64, amp: fp32, device: cpu, eval_interval_steps: 2, checkpoint_dir: runs/tiny}
"""
PLAN = """\
base: config.yaml
budget: {tokens: 128}
baseline: swiglu
variants: {swiglu: {model: {base: transformer, mlp: swiglu}}, sine: {model: {base: transformer, mlp: sine}}}
"""
SMALL = ("--d-model", "16", "--n-layers", "1", "--n-heads", "2", "--vocab-size", "64")
SCRIPT = Path(sys.executable).with_name("psannlm")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder to work in whose files bear the names of libraries, and leave a mark when they are run."""
    code = "import builtins, os, sys\nopen('RUN_' + __name__, 'w').close()\nos._exit(99)\n"
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    lines = [f"The tide number {n} comes in twice a day and goes out {n * 7} times." for n in range(60)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "plan.yaml").write_text(PLAN, encoding="utf-8")
    return tmp_path


def run_in(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**environment, "OMP_NUM_THREADS": "1"}, timeout=900
    )
    assert sorted(path.name for path in folder.glob("RUN_*")) == [], done.stderr
    return done


@pytest.mark.slow
def test_ranks_import_nothing_from_working_folder(hostile: Path) -> None:
    done = run_in(hostile, [str(SCRIPT), "train", "config.yaml", "--nproc", "2"])
    assert done.returncode == 0, done.stderr


# Commands one after the other in a process that starts like the command psannlm, with the folder of a script first on
# its path: loading torch for each would take longer than all that they do. What is loaded already is not looked for
# again, so that the path itself is looked at too. They start fewer processes of a kind than a user's commands would.
ONE_PROCESS = """
import json, os, sys
from dataclasses import replace
from psannlm.commands.app import main
from psannlm.benchmarks.tokenization import bench
from psannlm.gpu_suite import suite
from psannlm.gpu_suite.checks import parallel
bench.KINDS = {"characters": bench.KINDS["characters"]}
suite.DRY_RUN = replace(suite.DRY_RUN, n_steps=2)
parallel._scaling = lambda *arguments: ([], "its ranks are started as those of the parity are")
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as ended:
        code = ended.code
    paths = {os.path.realpath(entry) for entry in sys.path}
    print("ENDED " + json.dumps([arguments[0], code, os.getcwd() in paths]), flush=True)
"""
STARTING = [
    ["bench-tokenizers", "--corpus", "corpus.txt", "--vocab-size", "300", "--repeats", "1"],
    ["bench-train", "--device", "cpu", "--steps", "1", "--repeats", "1", *SMALL, "--seq-len", "16"],
    ["bench-kv", "--device", "cpu", "--repeats", "1", *SMALL, "--batch-size", "2", "--no-context-growth"],
    ["compare", "plan.yaml"],
    # Its ranks shard the model, which imports what those of GPU-05 and of train --nproc do not.
    ["gpu-validate", "--device", "cpu", "--only", "GPU-06"],
    ["tokenize", "corpus.txt", "--per-line", "--vocab-size", "300", "--out", "t.model"],
    ["prep", "corpus.txt", "--per-line", "--tokenizer", "t.model", "--out", "p", "--workers", "2"],
]


@pytest.mark.slow
def test_subprocess_commands_import_nothing_from_working_folder(
    hostile: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    program = tmp_path_factory.mktemp("bin") / "several_commands.py"
    program.write_text(ONE_PROCESS, encoding="utf-8")
    done = run_in(hostile, [sys.executable, str(program), json.dumps(STARTING)])
    ended = [line.removeprefix("ENDED ") for line in done.stdout.splitlines() if line.startswith("ENDED ")]
    wanted = [(arguments[0], 0, False) for arguments in STARTING]
    assert [(name, code or 0, is_on_path) for name, code, is_on_path in map(json.loads, ended)] == wanted, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["-m", "psannlm", "schema", "config"],
        ["-mpsannlm", "schema", "config"],
        ["-B", "-m", "psann.lm.train.cli", "--config", "config.yaml", "--dry-run"],
    ],
    ids=lambda words: words[0],
)
def test_python_m_imports_nothing_from_working_folder(hostile: Path, words: list[str]) -> None:
    """Python itself has looked there for what it needs to find a module; from then on nothing does."""
    for name in ("psannlm", "typing"):  # what Python itself looks for before our first line runs, on some versions
        (hostile / f"{name}.py").unlink()
    done = run_in(hostile, [sys.executable, *words])
    assert done.returncode == 0, done.stderr


def test_import_path_leaves_out_working_folder_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    kept = [
        str(tmp_path / "mine"),
        *(entry for entry in sys.path if entry and os.path.realpath(entry) != str(tmp_path)),
    ]
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *kept])
    assert import_path() == kept
    # A checkout that is worked in, by a .pth file; and what the user names.
    monkeypatch.setattr(sys, "path", ["", *kept, str(tmp_path)])
    assert import_path() == [*kept, str(tmp_path)]
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *kept])
    assert import_path() == [str(tmp_path), *kept]


def test_python_program_passes_path_and_arguments(tmp_path: Path) -> None:
    odd = str(tmp_path / "it's: a \\ folder ü")
    (tmp_path / "json.py").write_text("raise SystemExit(99)", encoding="utf-8")
    code = "import json; print(json.dumps([sys.path, sys.argv[1:]]))"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, odd])
        command = python_program(code, "a b", "--c")
        expected = import_path()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, arguments = json.loads(done.stdout)
    assert (path, arguments) == (expected, ["a b", "--c"])
    assert odd in path


def test_python_command_runs_module_like_python_m(tmp_path: Path) -> None:
    done = subprocess.run(python_command("psannlm", "--version"), cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("psannlm "), done.stderr


@pytest.mark.slow
def test_training_works_without_home_tmpdir_or_thread_count(hostile: Path) -> None:
    """What cannot be used is done without: no folder of these is the user's wish for this command."""
    for name in NAMES:
        (hostile / f"{name}.py").unlink()
    nowhere = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR"), "/proc/nowhere")
    done = subprocess.run(
        [str(SCRIPT), "train", "config.yaml"],
        cwd=hostile,
        capture_output=True,
        text=True,
        env={**os.environ, **nowhere, "OMP_NUM_THREADS": "many"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (hostile / "runs" / "tiny" / "loss_curve.png").is_file()

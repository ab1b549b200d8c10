"""psannlm init: from an empty folder to commands that work as they are printed."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from psannlm.config.run import load_config

TEXT = "The tide comes in twice a day, and the sea is never late. "


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands_in(out: str) -> list[list[str]]:
    """Return the printed commands as a shell would split them, without the program's name."""
    lines = out.partition("next:\n")[2].splitlines()
    words = [shlex.split(line) for line in lines]
    assert {line[0] for line in words} == {"psannlm"}
    return [line[1:] for line in words]


def test_init_without_data_uses_builtin_text_with_notice(psannlm, empty: Path) -> None:
    done = psannlm("init")
    assert (done.code, done.err) == (0, "")
    assert "text: the language reference that comes with Python (name your own text with --data)" in done.out
    assert [line.split()[1] for line in done.out.splitlines() if line.startswith("wrote")] == [
        "config.yaml",
        "plan.yaml",
        "schemas/plan.schema.json",
        "schemas/config.schema.json",
    ]
    assert commands_in(done.out) == [
        ["train", "config.yaml"],
        ["generate", "--checkpoint", "runs/waveresnet_tiny", "--prompt", "The "],
        ["compare", "plan.yaml"],
    ]


@pytest.mark.slow
def test_printed_commands_run_as_they_are(psannlm, empty: Path) -> None:
    (empty / "my texts").mkdir()
    (empty / "my texts" / "a.txt").write_text(TEXT * 200, encoding="utf-8")
    done = psannlm("init", "it's mine", "--data", "my texts")
    assert done.code == 0, done.err
    train, generate, compare = commands_in(done.out)
    shorter = ["--max-steps", "2", "--set", "train.warmup_steps=1", "--set", "train.device=cpu"]
    assert psannlm(*train, *shorter).code == 0
    said = psannlm(*generate, "--max-new-tokens", "3", "--device", "cpu")
    assert said.code == 0, said.err
    assert said.out.startswith("The ")
    shown = psannlm(*compare, "--dry-run")
    assert shown.code == 0, shown.err
    assert "4 of 4 runs to " in " ".join((shown.out + shown.err).split())


def test_init_names_file_in_the_way_and_writes_nothing(psannlm, empty: Path) -> None:
    (empty / "config.yaml").write_text("mine\n", encoding="utf-8")
    done = psannlm("init")
    assert done.code == 1
    assert "config.yaml exists, and psannlm init overwrites nothing" in done.err
    assert "psannlm init DIR" in done.err
    assert {path.name for path in empty.iterdir()} == {"config.yaml"}
    assert (empty / "config.yaml").read_text(encoding="utf-8") == "mine\n"


def test_init_refuses_missing_text_before_writing(psannlm, empty: Path) -> None:
    done = psannlm("init", "new", "--data", "missing.txt")
    assert done.code == 2
    assert "missing.txt: no such file or folder" in done.err
    assert list(empty.iterdir()) == []


def test_init_prints_json(psannlm, empty: Path) -> None:
    done = psannlm("init", "new", "--size", "small", "--base", "respsann", "--json")
    written = json.loads(done.out)
    assert written["files"][:2] == ["new/config.yaml", "new/plan.yaml"]
    assert written["next"][0] == "psannlm train new/config.yaml"
    config = load_config("new/config.yaml")
    assert (config.model.base, config.model.d_model) == ("respsann", 192)


def test_init_names_option_of_refused_value(psannlm, empty: Path) -> None:
    done = psannlm("init", "--text-key", "", "--data", "a.txt")
    assert (done.code, done.err) == (2, "error: --text-key: is empty; give it a value, or drop the key\n")
    assert psannlm("init", "--data", "").err.startswith("error: an empty path names no text")


@pytest.mark.slow
def test_init_imports_no_torch_unless_gpu_is_asked_for(empty: Path) -> None:
    program = (
        "import sys\nfrom psannlm.commands.app import main\n"
        "try:\n    main(['init', 'new'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

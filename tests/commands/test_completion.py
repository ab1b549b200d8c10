"""Shell completion: the scripts, and what they ask psannlm for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# What the script of each shell calls to be found by the shell.
HOOKS = {
    "bash": "complete -o default -F _psannlm_completion psannlm",
    "zsh": "compdef _psannlm_completion psannlm",
    "fish": "complete --command psannlm",
}


def ask(*words: str, **variables: str) -> str:
    """Run psannlm as a shell does, with variables set; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "psannlm", *words],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def complete(line: str) -> list[str]:
    """Return what bash offers for the last word of a line."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    return ask(_PSANNLM_COMPLETE="complete_bash", **words).split()


@pytest.mark.slow
@pytest.mark.parametrize("shell", HOOKS)
def test_completion_script_is_printed_for_each_shell(shell: str) -> None:
    # Typer's own variable for tests: the option takes the shell as a value instead of detecting it.
    shown = ask("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert HOOKS[shell] in shown
    assert "_PSANNLM_COMPLETE" in shown
    # The documented way to the script of another shell.
    assert ask(_PSANNLM_COMPLETE=f"source_{shell}").strip() == shown.strip()
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=shown, text=True, check=True)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("psannlm tr", ["train"]),
        ("psannlm bench-t", ["bench-tokenizers", "bench-train"]),
        ("psannlm schema ", ["config", "plan"]),
        ("psannlm train --re", ["--resume"]),
        ("psannlm generate --dtype ", ["float32", "bfloat16", "int8"]),
        ("psannlm xyz", []),
    ],
)
def test_completion_offers_commands_options_and_choices(line: str, offered: list[str]) -> None:
    assert complete(line) == offered


@pytest.mark.slow
def test_zsh_and_fish_completion_shows_command_help() -> None:
    line = {"_TYPER_COMPLETE_ARGS": "psannlm tr"}
    assert '"train":"Train a model from a YAML configuration."' in ask(_PSANNLM_COMPLETE="complete_zsh", **line)
    fish = {**line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    assert ask(_PSANNLM_COMPLETE="complete_fish", **fish) == "train\tTrain a model from a YAML configuration.\n"


def test_completion_imports_no_torch() -> None:
    program = (
        "import os, sys\n"
        "os.environ |= {'_PSANNLM_COMPLETE': 'complete_bash', 'COMP_WORDS': 'psannlm tr', 'COMP_CWORD': '1'}\n"
        "from psannlm.commands.app import main\n"
        "try:\n    main([])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stdout) == (0, "train\n"), done.stderr


def test_installed_completion_stays_in_home_folder(tmp_path: Path) -> None:
    said = ask("--install-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1", HOME=str(tmp_path))
    script = tmp_path / ".bash_completions" / "psannlm.sh"
    # The terminal may wrap the path.
    assert str(script) in said.replace("\n", "")
    assert HOOKS["bash"] in script.read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {".bashrc", ".bash_completions"}


def test_guide_names_options_and_files_that_are_written() -> None:
    guide = (REPOSITORY / "docs" / "guides" / "completion.md").read_text(encoding="utf-8")
    assert {"--install-completion", "--show-completion"} <= set(re.findall(r"--[a-z-]+", guide))
    assert "~/.bash_completions/psannlm.sh" in guide

"""`make demo` with the user's settings, folder and prompt: it works as typed, or names the cause."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a runner of `make demo` in ``tmp_path / name``, where programs write down what they are given."""

    def run(
        *arguments: str, name: str = "clone", is_installed: bool = True, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        clone = tmp_path / name
        programs = clone / ".venv" / "bin"
        programs.mkdir(parents=True)
        for file in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(REPOSITORY / file, clone)
        for program in ("psannlm", "python"):
            words = f'printf "%s\\0" "$@" > "{tmp_path}/{program}.arguments"; env -0 > "{tmp_path}/{program}.env"'
            (programs / program).write_text(f"#!/bin/sh\n{words}\n", encoding="utf-8")
            (programs / program).chmod(0o755)
        if is_installed:
            (clone / ".venv" / ".installed").touch()
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "MAKE"))}
        return subprocess.run(
            ["make", *arguments, "demo"],
            cwd=clone,
            env={**environment, **variables},
            capture_output=True,
            text=True,
        )

    return run


def written(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\0")[:-1]


@pytest.mark.parametrize(
    "prompt",
    [
        'He said "no"',
        "it's",
        "cost $5 $HOME $(shell id) ${PATH} $$",
        "`id` \\ !x",
        "-n",
        "a;b|c&d>e #f",
        "",
        "two\nlines",
    ],
)
def test_the_prompt_reaches_the_program_as_typed(
    tmp_path: Path, make: Callable[..., subprocess.CompletedProcess[str]], prompt: str
) -> None:
    done = make(name="first", PROMPT=prompt)
    assert done.returncode == 0, done.stderr
    assert written(tmp_path / "psannlm.arguments") == ["generate", f"--prompt={prompt}"]
    (tmp_path / "psannlm.arguments").unlink()
    done = make(f"PROMPT={prompt}", name="second")
    assert done.returncode == 0, done.stderr
    assert written(tmp_path / "psannlm.arguments") == ["generate", f"--prompt={prompt}"]


def test_settings_of_pip_send_no_package_elsewhere(
    tmp_path: Path, make: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = make(is_installed=False, PIP_USER="1", PIP_TARGET="/elsewhere", PIP_PREFIX="/elsewhere")
    assert done.returncode == 0, done.stderr
    assert "install" in written(tmp_path / "python.arguments")
    environment = dict(line.split("=", 1) for line in written(tmp_path / "python.env") if line.startswith("PIP_"))
    assert environment == {
        "PIP_USER": "0",
        "PIP_CONSTRAINT": "constraints.txt",
        "PIP_BUILD_CONSTRAINT": "constraints.txt",
    }


def test_a_colon_in_the_path_is_named(tmp_path: Path) -> None:
    clone = tmp_path / "a:b"
    clone.mkdir()
    for file in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / file, clone)
    done = subprocess.run(["make", "demo"], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 2
    assert "its path holds a colon" in done.stdout
    assert "python3-venv" not in done.stdout
    assert not (clone / ".venv").exists()

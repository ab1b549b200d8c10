"""What the README tells a reader to type exists: commands, options, files, code."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from psannlm.commands.app import app

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
LINES = [
    line[2:].partition("#")[0].strip()
    for language, block in BLOCKS
    if language == "console"
    for line in block.splitlines()
    if line.startswith("$ ")
]
OURS = [line for line in LINES if re.search(r"(^|/)psannlm |-m psannlm ", line)]


def test_there_is_something_to_check() -> None:
    assert {"make demo", "make test"} <= set(LINES)
    assert len(OURS) >= 6


@pytest.mark.parametrize("line", OURS)
def test_commands_and_options_exist(line: str) -> None:
    words = shlex.split(re.split(r"(?:^|/|-m )psannlm ", line, maxsplit=1)[1])
    root = typer.main.get_command(app)
    assert isinstance(root, click.Group) or hasattr(root, "commands")
    command = root.commands[words[0]]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known
    for word in words:
        if word.startswith("configs/"):
            assert (REPOSITORY / word).is_file()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = {line.split()[1] for line in LINES if line.startswith("make ")}
    assert named <= targets


def test_python_blocks_are_python_and_links_lead_somewhere() -> None:
    for language, block in BLOCKS:
        if language == "python":
            ast.parse(block)
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPOSITORY / target).exists(), target


def test_the_index_is_never_asked_for_our_name() -> None:
    everything = [README, *(path.read_text(encoding="utf-8") for path in REPOSITORY.glob("docs/*.md"))]
    assert not [text for text in everything if re.search(r"pip install( -\S+)* psannlm\b", text)]

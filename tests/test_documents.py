"""Claims of README.md and docs/ that can be checked: commands, options, files, code, figures and lengths."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import psannlm
from psannlm.commands.app import build_app

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
# The log of experiments records commands as they were typed on their day.
LOG = REPOSITORY / "docs/research/log.md"
PAGES = [README, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "SECURITY.md", *sorted(REPOSITORY.glob("docs/**/*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
README_WORDS = 1200
LINE_WIDTH = 120


def blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"```(\w+)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def typed_lines(page: Path) -> Iterator[str]:
    """What a reader types: the lines behind a prompt, and commands of ours in running text."""
    text = page.read_text(encoding="utf-8")
    for language, block in blocks(page):
        if language == "console":
            yield from (line[2:].partition(" #")[0].strip() for line in block.splitlines() if line.startswith("$ "))
    prose = re.sub(r"```.*?```|<!-- generated.*?generated: end -->", "", text, flags=re.DOTALL)
    yield from (
        " ".join(code.split()).replace("\\|", "|") for code in re.findall(r"`((?:[.\w/]*bin/)?psannlm\s[^`]+)`", prose)
    )


LINES = {page: list(typed_lines(page)) for page in PAGES if page != LOG}
COMMANDS = sorted(
    {
        (page.relative_to(REPOSITORY).as_posix(), part.strip())
        for page, lines in LINES.items()
        for line in lines
        for part in line.split(" | ")
        if re.search(r"(^|bin/|-m )psannlm ", part) and "<Tab>" not in part
    }
)


def test_documents_hold_commands_to_check() -> None:
    assert {"make demo"} <= set(LINES[README])
    assert len([page for page, _ in COMMANDS if page == "README.md"]) >= 6
    assert len(COMMANDS) >= 40


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_documented_commands_and_options_exist(page: str, line: str) -> None:
    words = shlex.split(re.split(r"(?:^|bin/|-m )psannlm ", line, maxsplit=1)[1])
    root: Any = typer.main.get_command(build_app())
    command: Any = root if words[0].startswith("-") else root.commands[words[0]]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if re.match("--?[a-z]", word)} <= known | {"--help", "--debug"}
    for word in words:
        if word.startswith(("configs/", "examples/")) and not re.search(r"[<*]", word):
            assert (REPOSITORY / word).is_file()


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page != LOG)
    text += "\n".join(path.read_text(encoding="utf-8") for path in REPOSITORY.glob(".github/workflows/*.yml"))
    named = set(re.findall(r"(?:^|`|\$ |run: )make (?:PYTHON=\S+ )?([a-z][a-z-]*)", text, flags=re.MULTILINE))
    assert {"demo", "test", "test-all", "check", "lint", "docs", "wheel"} <= named
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_scripts_exist(page: Path) -> None:
    if page not in (LOG, REPOSITORY / "docs/guides/migration.md"):
        for script in re.findall(r"\bscripts/\w+\.(?:py|sh|yaml)", page.read_text(encoding="utf-8")):
            assert (REPOSITORY / script).is_file(), script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_parse(page: Path) -> None:
    for language, block in blocks(page):
        if language == "python":
            ast.parse(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_is_wrapped(page: Path) -> None:
    """Tables, images and code cannot be wrapped."""
    text = re.sub(r"```.*?```|`[^`]+`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("|", "!["))]
    assert [line for line in lines if len(line) > LINE_WIDTH] == []


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= README_WORDS


def test_readme_results_stand_in_the_study() -> None:
    """Every row of the table of results is a row of docs/research/results.md, figure by figure."""
    study = (REPOSITORY / "docs/research/results.md").read_text(encoding="utf-8")
    section = re.findall(r"^## Results\n(.*?)^## ", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    rows = [line for line in section[0].splitlines() if line.startswith("| ") and "%" in line]
    assert len(rows) >= 4
    for row in rows:
        figures = re.findall(r"[-+]\d+\.\d %|\([-+]\d+\.\d to [-+]\d+\.\d\)", row)
        assert figures
        assert any(all(figure in line for figure in figures) for line in study.splitlines()), row


def test_readme_lists_every_command() -> None:
    root: Any = typer.main.get_command(build_app())
    rows = re.findall(r"^\| `psannlm ([\w-]+)` \|", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(rows) == sorted(root.commands)


def test_citation_names_this_version() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == psannlm.__version__


def test_documents_never_install_our_name_from_the_index() -> None:
    sources = [path for folder in ("psannlm", "commands", "psann") for path in (REPOSITORY / folder).rglob("*.py")]
    texts = {path: path.read_text(encoding="utf-8") for path in (*PAGES, *sources)}
    ours = re.compile(r"install( -\S+)* ['\"]?psannlm(?=[\[ '\"`,.;)]|$)", re.MULTILINE)
    assert [path for path, text in texts.items() if ours.search(text)] == []


def test_sphinx_builds_every_page_once() -> None:
    """A page that no table of contents names is unreachable in the built documentation."""
    index = (REPOSITORY / "docs/index.md").read_text(encoding="utf-8")
    named = [
        line
        for block in re.findall(r"```\{toctree\}\n(.*?)```", index, flags=re.DOTALL)
        for line in block.splitlines()
        if line and not line.startswith(":")
    ]
    folder = REPOSITORY / "docs"
    pages = {page.relative_to(folder).with_suffix("").as_posix() for page in PAGES if folder in page.parents}
    assert sorted([*named, "index"]) == sorted(pages)

"""The frame around the code: pins, packages, change log, files and links agree with each other."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import psannlm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[1]
MAX_FILE_BYTES = 2_000_000
MAX_FUNCTION_LINES = 80
MAX_MODULES = 20
MAX_PACKAGE_SHARE = 0.15


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout: what is tracked cannot be told")
    listing = subprocess.run(
        ["git", "-c", f"safe.directory={REPOSITORY}", "ls-files", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [REPOSITORY / name for name in listing.stdout.split("\0") if name]
    assert paths
    return [path for path in paths if path.is_file()]


def _pins(python: str) -> dict[str, list[str]]:
    """Every pinned version by package, as ``python`` (such as 3.10) reads constraints.txt."""
    pins: dict[str, list[str]] = {}
    for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        (pin,) = requirement.specifier
        assert pin.operator == "==", line
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            pins.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
    return pins


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.14"])
def test_each_dependency_has_one_tested_version_within_its_bounds(project: dict[str, Any], python: str) -> None:
    pins = _pins(python)
    assert {name: versions for name, versions in pins.items() if len(versions) != 1} == {}
    lines = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["dev"]
    lines += project["project"]["optional-dependencies"]["docs"]
    lines += project["build-system"]["requires"]
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            (version,) = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), requirement


def test_every_package_is_shipped_and_named_once(project: dict[str, Any]) -> None:
    """A room that is missing from ``packages`` works in the checkout and is missing from the wheel."""
    found = {file.parent.relative_to(REPOSITORY) for top in ("psannlm", "psann") for file in top_files(top)}
    names = {".".join(folder.parts) for folder in found} | {"psannlm.commands"}
    shipped = project["tool"]["setuptools"]["packages"]
    assert sorted(shipped) == sorted(names)
    assert project["tool"]["setuptools"]["package-dir"] == {"psannlm.commands": "commands"}
    assert not (REPOSITORY / "psann" / "__init__.py").exists(), "psann is a namespace that others may share"


def top_files(top: str) -> list[Path]:
    return [file for file in (REPOSITORY / top).rglob("*.py") if (file.parent / "__init__.py").exists()]


def test_no_folder_of_modules_lacks_its_init() -> None:
    folders = {file.parent for top in ("psannlm", "commands", "psann/lm") for file in (REPOSITORY / top).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_tests_are_no_package() -> None:
    """``tests/commands/__init__.py`` would shadow the real package."""
    assert list((REPOSITORY / "tests").rglob("__init__.py")) == []


def test_changelog_newest_release_is_this_version() -> None:
    text = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\S+)$", text, flags=re.MULTILINE)
    assert releases[0][0] == psannlm.__version__
    days = [date.fromisoformat(day) for _, day in releases]
    assert days == sorted(days, reverse=True)
    headings = set(re.findall(r"^### (.*)$", text, flags=re.MULTILINE))
    assert headings <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_no_tracked_file_is_large(tracked: list[Path]) -> None:
    assert [path for path in tracked if path.stat().st_size > MAX_FILE_BYTES] == []


def test_repository_names_no_package_index(tracked: list[Path]) -> None:
    """Registries are the business of the machine that installs; a pinned address breaks on every other one."""
    # Options that name a registry, in any file; this one spells them in parts, so as not to be found itself.
    words = ["-".join(parts) for parts in (("index", "url"), ("find", "links"), ("trusted", "host"))]
    words += [word.upper().replace("-", "_") for word in words]
    found = []
    for path in tracked:
        content = path.read_bytes()
        found += [(str(path.relative_to(REPOSITORY)), word) for word in words if word.encode() in content]
    assert found == []


def test_scripts_are_executable_and_stop_at_first_error(tracked: list[Path]) -> None:
    scripts = [path for path in tracked if path.read_bytes().startswith(b"#!/usr/bin/env bash")]
    assert REPOSITORY / ".ci" / "run" in scripts
    for script in scripts:
        assert os.access(script, os.X_OK), script
        assert "\nset -euo pipefail\n" in script.read_text(encoding="utf-8"), script


def test_links_between_documents_lead_somewhere(tracked: list[Path]) -> None:
    broken = []
    for path in tracked:
        if path.suffix == ".md":
            for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", path.read_text(encoding="utf-8")):
                if "://" not in target and not (path.parent / target).exists():
                    broken.append((str(path.relative_to(REPOSITORY)), target))
    assert broken == []


def test_documents_named_anywhere_exist(tracked: list[Path]) -> None:
    """Comments, messages and scripts name documents by their path from the root; a move must not leave them behind."""
    old_paths = REPOSITORY / "docs/guides/migration.md"
    missing = []
    for path in tracked:
        if path.suffix in (".py", ".md", ".yaml", ".yml", ".sh", ".toml") and path != old_paths:
            for name in re.findall(r"(?<![\w/.])docs/[\w/-]+\.md\b", path.read_text(encoding="utf-8")):
                if not (REPOSITORY / name).is_file():
                    missing.append((str(path.relative_to(REPOSITORY)), name))
    assert missing == []


def test_make_lists_its_targets() -> None:
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)
    explained = re.findall(r"^([a-z-]+):.* ## ", text, flags=re.MULTILINE)
    assert explained == phony.split()


def _modules() -> dict[Path, list[str]]:
    """Every module of the library with its lines."""
    files = [file for top in ("psannlm", "commands", "psann") for file in (REPOSITORY / top).rglob("*.py")]
    return {file.relative_to(REPOSITORY): file.read_text(encoding="utf-8").splitlines() for file in files}


def test_no_function_is_longer_than_eighty_lines() -> None:
    longer = {}
    for path, lines in _modules().items():
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                n_lines = (node.end_lineno or first) - first + 1
                if n_lines > MAX_FUNCTION_LINES:
                    longer[f"{path}: {node.name}"] = n_lines
    assert longer == {}


def test_folders_and_packages_stay_small() -> None:
    """A folder that can be taken in at one look, and no package that outgrows the others."""
    modules = _modules()
    counts = Counter(path.parent for path in modules if path.name != "__init__.py")
    assert {folder: count for folder, count in counts.items() if count > MAX_MODULES} == {}
    sizes: Counter[str] = Counter()
    for path, lines in modules.items():
        sizes["/".join(path.parts[:2]) if path.parts[0] == "psannlm" else path.parts[0]] += len(lines)
    limit = MAX_PACKAGE_SHARE * sizes.total()
    assert {package: size for package, size in sizes.items() if size > limit} == {}

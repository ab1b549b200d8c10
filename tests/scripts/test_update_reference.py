"""docs/reference/config.md and cli.md agree with the configuration and the command line."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from psannlm.commands.app import build_app
from psannlm.config.reference import keys

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("update_reference", REPOSITORY / "scripts" / "update_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["config.md", "cli.md"])
def test_reference_pages_are_current(script: ModuleType, page: str) -> None:
    old, new = script.updated(page)
    assert old == new, "run python scripts/update_reference.py"


def test_config_tables_hold_every_key_once(script: ModuleType) -> None:
    rows = [line for line in script.config_tables().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [key.path for key in keys()]


def test_command_tables_hold_every_command_and_option(script: ModuleType) -> None:
    root: Any = typer.main.get_command(build_app())
    sections = script.command_tables().split("## psannlm ")[1:]
    assert [section.splitlines()[0] for section in sections] == list(root.commands)
    for section, command in zip(sections, root.commands.values(), strict=True):
        rows = [line for line in section.splitlines() if line.startswith("| `")]
        assert {row.replace("\\|", "").count("|") for row in rows} == {3}
        for parameter in command.params:
            names = [name for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("-")]
            assert all(any(name in row.split("`")[1] for row in rows) for name in names), names


def test_check_fails_on_an_old_page(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for page in script.PAGES:
        (tmp_path / page).write_text(f"# Title\n{script.BEGIN}\nold\n{script.END}\nend\n", encoding="utf-8")
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    monkeypatch.setattr("sys.argv", ["update_reference.py", "--check"])
    with pytest.raises(SystemExit, match=r"config\.md is out of date"):
        script.main()
    monkeypatch.setattr("sys.argv", ["update_reference.py"])
    script.main()
    assert (tmp_path / "cli.md").read_text(encoding="utf-8").startswith(f"# Title\n{script.BEGIN}\n\n## psannlm ")
    assert (tmp_path / "config.md").read_text(encoding="utf-8").endswith(f"{script.END}\nend\n")
    monkeypatch.setattr("sys.argv", ["update_reference.py", "--check"])
    script.main()
    (tmp_path / "cli.md").write_text("no markers", encoding="utf-8")
    with pytest.raises(SystemExit, match="lacks the markers"):
        script.main()

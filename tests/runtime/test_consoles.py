"""Consoles print text literally with visible escapes; no environment variable turns a file into a terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.table import Table

from psannlm.display import printable
from psannlm.runtime.consoles import FiguresTable, make_console

WANTED = "o:100:[red]x/" + "a long folder name " * 12
VARIABLES = {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"}


class Terminal(io.StringIO):
    """What says of itself that it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def shown(page: io.StringIO, *things: object) -> str:
    make_console(file=page).print(*things)
    return page.getvalue()


def test_console_prints_paths_unbroken() -> None:
    assert shown(io.StringIO(), WANTED) == f"{WANTED}\n"


@pytest.mark.parametrize("columns", ["0", "1", "20", "junk", "²", "-5", "9" * 5000, ""])
def test_console_tables_in_files_show_full_values(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = shown(io.StringIO(), FiguresTable("title :100:", [("folder", WANTED), ("kind", "[bold]x[/bold]")]))
    assert WANTED in text
    assert "[bold]x[/bold]" in text
    assert "title :100:" in text
    table = Table("name", "value")
    table.add_row("loss", "1.2345 nats per token")
    assert "1.2345 nats per token" in shown(io.StringIO(), table)


def test_console_columns_limit_text_but_not_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / ("a folder " * 20)
    folder.mkdir()
    prose = "words of a long sentence " * 10
    text = shown(io.StringIO(), FiguresTable("title", [("note", prose)]))
    assert max(map(len, text.splitlines())) <= 80
    text = shown(io.StringIO(), FiguresTable("title", [("note", "short"), ("folder", str(folder))]))
    assert str(folder) in text


@pytest.mark.parametrize("columns", ["0", "1", "20", "junk"])
def test_console_tables_on_terminals_fit_values(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    assert "1.2345" in shown(Terminal(), FiguresTable("title", [("validation loss", "1.2345")]))


def test_console_file_is_never_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    console = make_console(stderr=True)
    assert (console.is_terminal, console.is_interactive) == (False, False)
    console.print("text", style="bold red")
    assert sys.stderr.getvalue() == "text\n"  # type: ignore[attr-defined]


def test_console_shows_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    hostile = "a\x1b[2Jb\u202ec\x9bd\udce9"
    for page in (io.StringIO(), Terminal()):
        text = shown(page, hostile, FiguresTable(hostile, [(hostile, hostile)]))
        assert text.count("a\\x1b[2Jb\\u202ec\\x9bd\\xe9") == 4
        assert printable(text, keep="\n") == text


def test_console_styles_reach_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name in (*VARIABLES, "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    page = Terminal()
    make_console(file=page).print("text", style="bold")
    assert page.getvalue() == "\x1b[1mtext\x1b[0m\n"

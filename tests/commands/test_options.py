"""Shared options, consoles and the progress line, with and without a terminal."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console
from rich.table import Table

from psannlm.commands.options import (
    LiveLine,
    duration_s,
    figures_table,
    live_line,
    print_json,
    print_message,
    stderr_console,
    table_text,
    text_argument,
)
from psannlm.runtime.consoles import print_line
from psannlm.runtime.log import receiving_messages


def test_live_line_limits_plain_lines() -> None:
    now = 0.0
    page = io.StringIO()
    line = LiveLine(Console(file=page, width=200), None, clock=lambda: now)
    shown = []
    for tenth in range(130):
        now = tenth / 10
        line.show(f"at {now}")
        if page.getvalue().count("\n") > len(shown):
            shown.append(now)
    assert shown == [1.0, 6.0, 11.0], "the first one early, then every five seconds"
    assert page.getvalue().splitlines() == ["at 1.0", "at 6.0", "at 11.0"]


class Terminal(io.StringIO):
    """A stream that calls itself a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
def test_message_prints_above_live_line(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    page = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", page)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(LiveLine, "_REDRAW_S", 0.0)
    with receiving_messages(print_message), live_line(stderr_console()) as line:
        line.show("at work")
        logging.getLogger("psannlm.prep.pipeline").info("[a] message")
        line.show("too early to be shown")
    text = page.getvalue()
    assert "[a] message" in text
    # On a terminal the live line is drawn again below the message.
    assert text.count("at work") == (2 if is_terminal else 1)
    assert text.index("[a] message") < (text.rindex("at work") if is_terminal else len(text))


def test_console_of_stderr_follows_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = io.StringIO(), io.StringIO()
    for page in pages:
        monkeypatch.setattr(sys, "stderr", page)
        assert stderr_console() is stderr_console()
        print_message("here")
    assert [page.getvalue() for page in pages] == ["here\n"] * 2


def test_table_text_has_no_styles() -> None:
    table = Table("name", title="[bold]figures[/bold]")
    table.add_row("é")
    text = table_text(table, table)
    assert text.count("figures") == 2
    assert "\x1b" not in text


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_print_json_is_strict_in_any_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    page = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(page, encoding))
    path = os.fsdecode(b"caf\xe9") + "–\x1b"
    print_json({"loss": math.nan, "rows": [(1, -math.inf)], "path": Path(path)})
    text = page.getvalue().decode(encoding)
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": None, "rows": [[1, None]], "path": path}
    assert "\x1b" not in text


def test_text_argument_reads_bytes_as_utf8() -> None:
    assert text_argument(os.fsdecode("é–".encode())) == "é–"
    assert text_argument("é".encode().decode("ascii", "surrogateescape")) == "é"
    assert text_argument("\udce9") == "\udce9"


def test_console_escapes_control_characters() -> None:
    hostile = "a\x1b[2J\x9b\u202e\udce9"
    shown = "a\\x1b[2J\\x9b\\u202e\\xe9"
    page = io.StringIO()
    print_line(Console(file=page, width=200), hostile)
    assert page.getvalue() == f"{shown}\n"
    text = table_text(figures_table(hostile, [(hostile, hostile)]))
    assert text.count(shown) == 3
    text.encode("utf-8")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("20m", 1200), ("1h30m", 5400), ("1.5h", 5400), ("1d2h", 93_600), ("0.5s", 0.5)]
)
def test_duration_known_values(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "20", "m", "0s", "-5m", "20 m", "20min", "1h 30m", "nan", "infs", "2m!"])
def test_duration_error_gives_examples(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="90s, 20m or 1h30m"):
        duration_s(text)

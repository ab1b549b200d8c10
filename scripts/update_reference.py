"""Generated parts of docs/reference/: the configuration keys in config.md and the command line in cli.md.

Run from anywhere: ``python scripts/update_reference.py``. ``--check`` changes nothing and fails on a page out of date.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from psannlm.commands.app import build_app
from psannlm.config.reference import markdown_table

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
BEGIN = "<!-- generated: begin (scripts/update_reference.py) -->"
END = "<!-- generated: end -->"


def config_tables() -> str:
    """Return a Markdown table of keys for each section of the configuration."""
    head, rule, *rows = markdown_table().splitlines()
    sections: dict[str, list[str]] = {}
    for row in rows:
        sections.setdefault(row.removeprefix("| `").partition(".")[0], []).append(row)
    return "\n\n".join("\n".join([f"## {name}", "", head, rule, *lines]) for name, lines in sections.items())


def command_tables() -> str:
    """Return a heading, the usage and a table of arguments and options for each command."""
    root: Any = typer.main.get_command(build_app())
    return "\n\n".join("\n".join(_command_lines(name, command)) for name, command in root.commands.items())


def _command_lines(name: str, command: Any) -> Iterator[str]:
    context = command.context_class(command, info_name=f"psannlm {name}")
    yield f"## psannlm {name}"
    yield ""
    yield textwrap.fill(" ".join(command.help.split()), 120, break_long_words=False, break_on_hyphens=False)
    yield ""
    yield "```text"
    yield f"{context.command_path} {' '.join(command.collect_usage_pieces(context))}"
    yield "```"
    yield ""
    yield "| argument or option | meaning |"
    yield "|---|---|"
    for parameter in command.params:
        # Typer's own rendering, so that this page and --help state the same names, types and defaults.
        record = parameter.get_help_record(context)
        if record is not None:
            names, meaning = record
            yield f"| `{_cell(names)}` | {_cell(meaning).replace('<', '&lt;')} |"


def _cell(text: str) -> str:
    """Join the lines of a text and escape what would end a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


PAGES: dict[str, Callable[[], str]] = {"config.md": config_tables, "cli.md": command_tables}


def updated(page: str) -> tuple[str, str]:
    """Return the present text of a page, and that text with its generated part made from the code."""
    path = FOLDER / page
    old = path.read_text(encoding="utf-8")
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path} lacks the markers {BEGIN} and {END}; put them around the generated part")
    return old, f"{head}{BEGIN}\n\n{PAGES[page]()}\n\n{END}{tail}"


def main() -> None:
    """Rewrite the pages, or with ``--check`` exit with status 1 where one would change."""
    for page in PAGES:
        old, new = updated(page)
        if "--check" not in sys.argv[1:]:
            (FOLDER / page).write_text(new, encoding="utf-8")
        elif new != old:
            raise SystemExit(f"docs/reference/{page} is out of date; run python scripts/update_reference.py")


if __name__ == "__main__":
    main()

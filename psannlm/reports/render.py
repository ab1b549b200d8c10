"""HTML and Markdown of a report; the HTML page needs nothing beside it: no file, no network, no script."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from psannlm.display import markdown_code, markdown_text, printable
from psannlm.reports.page_model import Block, Document, Origin, Picture, Printed, Table

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
_WIDE_CELL = 32
_FIGURE_CLASS = Markup(' class="figure"')
# Media query, and the form of a picture for it; a page that is printed takes the wide and light one.
_FORMS = (
    ("screen and (max-width: 40rem) and (prefers-color-scheme: dark)", True, True),
    ("screen and (max-width: 40rem)", True, False),
    ("screen and (prefers-color-scheme: dark)", False, True),
)


def to_html(document: Document) -> str:
    """Return the whole page."""
    return _environment().get_template("report.html").render(document=document)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"figure_class": _FIGURE_CLASS, "forms": _FORMS}
    environment.filters |= {
        "breakable": _breakable,
        "cell_class": _cell_class,
        "data_url": _data_url,
        "figure": _figure,
    }
    environment.tests |= {
        "table": lambda block: isinstance(block, Table),
        "printed": lambda block: isinstance(block, Printed),
    }
    return environment


def _visible(value: object) -> object:
    """Show unseen characters as escapes in everything that a template prints; markup of ours is left as it is."""
    return printable(value, keep="\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value


def _figure(cell: str) -> Markup:
    """Put the lowest and highest value, in brackets after a figure, on a line below it."""
    figure, bracket, edges = cell.partition(" (")
    if not (bracket and edges.endswith(")")):
        return escape(_visible(cell))
    return Markup('{} <span class="edges">({}</span>').format(_visible(figure), _visible(edges))


def _breakable(name: str) -> Markup:
    """Let a long name break after the characters that separate its parts."""
    return Markup(re.sub(r"([_/.=])(?=[^_/.=])", r"\1<wbr>", str(escape(_visible(name)))))


def _cell_class(cell: str, is_figure: bool) -> Markup:
    if is_figure:
        return _FIGURE_CLASS
    if len(cell) > _WIDE_CELL:
        return Markup(' class="wide"')
    return Markup(' class="path"' if "/" in cell and " " not in cell else "")


def _data_url(content: bytes, kind: str) -> Markup:
    """Return an image as a URL that holds it, of characters that HTML gives no meaning."""
    return Markup(f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}")


def to_markdown(document: Document) -> str:
    """Return the page as Markdown; its pictures are the PNG files beside it."""
    return "\n".join(_markdown(document)) + "\n"


def _markdown(document: Document) -> Iterator[str]:
    yield f"# {markdown_text(document.title)}"
    yield f"\n{markdown_text(document.lead)}"
    if document.headlines:
        yield ""
    for headline in document.headlines:
        of = f": {markdown_text(headline.of)}" if headline.of else ""
        value = f"**{markdown_text(headline.value)}**{f' {markdown_text(headline.unit)}' if headline.unit else ''}"
        yield f"- {markdown_text(headline.label)}: {value}{of}"
    for section in document.sections:
        yield f"\n## {markdown_text(section.title)}"
        if section.origin is not None:
            yield from _markdown_origin(section.origin)
        for block in section.blocks:
            yield from _markdown_block(block)
    yield "\n---"
    yield from _markdown_origin(document.origin)


def _markdown_block(block: Block) -> Iterator[str]:
    if isinstance(block, str):
        yield f"\n{markdown_text(block)}"
    elif isinstance(block, Picture):
        yield f"\n![{markdown_text(block.alternative)}]({block.file})"
        if block.caption:
            yield f"\n{markdown_text(block.caption)}"
    elif isinstance(block, Table):
        if block.title:
            yield f"\n### {markdown_text(block.title)}"
        yield f"\n| {' | '.join(markdown_text(text) for text in block.headings)} |"
        yield f"|{'|'.join('--:' if at in block.numbers else '---' for at in range(len(block.headings)))}|"
        yield from (f"| {' | '.join(markdown_text(cell) for cell in row)} |" for row in block.rows)
        if block.note:
            yield f"\n{markdown_text(block.note)}"
        if block.origin is not None:
            yield from _markdown_origin(block.origin)


def _markdown_origin(origin: Origin) -> Iterator[str]:
    command = markdown_code(origin.command)
    commit = f"commit {markdown_text(origin.commit)}" if origin.commit else ""
    if parts := [
        part for part in (command, markdown_text(origin.machine), commit, markdown_text(origin.folder)) if part
    ]:
        yield f"\n{' · '.join(parts)}"

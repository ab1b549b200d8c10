"""A document becomes Markdown, and one HTML page that needs nothing beside it: no file, no network, no script."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator

from psannlm.display import html_text, markdown_code, markdown_text
from psannlm.reports.page_model import Block, Document, Headline, Origin, Picture, Printed, Section, Table
from psannlm.reports.stylesheet import STYLE

_PHONE = "(max-width: 40rem)"
_DARK = "(prefers-color-scheme: dark)"
# Nothing may be loaded or run, whatever stands in the text: a second wall behind the escaping.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_WIDE_CELL = 32


def to_html(document: Document) -> str:
    """Return the whole page."""
    return "\n".join(_page(document)) + "\n"


def _page(document: Document) -> Iterator[str]:
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield '<meta name="color-scheme" content="light dark">'
    yield f"<title>{html_text(document.title)}</title>"
    yield f"<style>{STYLE}</style></head><body><main>"
    yield f'<h1>{html_text(document.title)}</h1><p class="soft">{html_text(document.lead)}</p>'
    if document.headlines:
        yield '<dl class="headlines">'
        yield from (_headline(headline) for headline in document.headlines)
        yield "</dl>"
    if len(document.sections) > 2:
        links = (f'<a href="#s{at}">{html_text(section.title)}</a>' for at, section in enumerate(document.sections))
        yield f'<nav aria-label="Sections">{" ".join(links)}</nav>'
    for at, section in enumerate(document.sections):
        yield from _section(section, at)
    yield f'<footer><p class="origin">{_origin(document.origin, "This page: ")}</p></footer>'
    yield "</main></body></html>"


def _headline(headline: Headline) -> str:
    unit = f' <span class="unit">{html_text(headline.unit)}</span>' if headline.unit else ""
    of = f'<span class="of">{html_text(headline.of)}</span>' if headline.of else ""
    value = f'<span class="value">{html_text(headline.value)}</span>'
    return f"<div><dt>{html_text(headline.label)}</dt><dd>{value}{unit}{of}</dd></div>"


def _section(section: Section, at: int) -> Iterator[str]:
    yield f'<section id="s{at}"><h2>{html_text(section.title)}</h2>'
    if section.origin is not None:
        yield f'<p class="origin">{_origin(section.origin)}</p>'
    for block in section.blocks:
        yield from _block(block)
    yield "</section>"


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, str):
        yield f"<p>{html_text(block)}</p>"
    elif isinstance(block, Table):
        yield from _table(block)
    elif isinstance(block, Printed):
        pre = f'<pre tabindex="0">{html_text(block.text)}</pre>'
        yield f"<details><summary>{html_text(block.title)}</summary>{pre}</details>"
    else:
        yield from _picture(block)


def _table(table: Table) -> Iterator[str]:
    title = html_text(table.title)
    if table.is_folded:
        yield f"<details><summary>{title}</summary>"
    elif title:
        yield f"<h3>{title}</h3>"
    yield f'<div class="scroll" tabindex="0" role="region" aria-label="{title or "table"}"><table>'
    heads = (f'<th scope="col"{_class(at in table.numbers)}>{html_text(h)}</th>' for at, h in enumerate(table.headings))
    yield f"<thead><tr>{''.join(heads)}</tr></thead><tbody>"
    for row in table.rows:
        first, *others = row
        cells = "".join(
            f"<td{_class(at in table.numbers, cell)}>{_cell(cell, at in table.numbers)}</td>"
            for at, cell in enumerate(others, 1)
        )
        yield f'<tr><th scope="row"{_class(0 in table.numbers)}>{_breakable(first)}</th>{cells}</tr>'
    yield "</tbody></table></div>"
    if table.note:
        yield f'<p class="soft">{html_text(table.note)}</p>'
    if table.origin is not None and (origin := _origin(table.origin)):
        yield f'<p class="origin">{origin}</p>'
    if table.is_folded:
        yield "</details>"


def _cell(cell: str, is_figure: bool) -> str:
    """A figure's edges, in brackets after it, go on a line below it."""
    figure, bracket, edges = cell.partition(" (")
    if not (is_figure and bracket and edges.endswith(")")):
        return html_text(cell) if is_figure else _breakable(cell)
    return f'{html_text(figure)} <span class="edges">({html_text(edges)}</span>'


def _breakable(name: str) -> str:
    """Let a long name break where a person would break it."""
    return re.sub(r"([_/.=])(?=[^_/.=])", r"\1<wbr>", html_text(name))


def _class(is_figure: bool, cell: str = "") -> str:
    if is_figure:
        return ' class="figure"'
    if len(cell) > _WIDE_CELL:
        return ' class="wide"'
    return ' class="path"' if "/" in cell and " " not in cell else ""


def _origin(origin: Origin, lead: str = "") -> str:
    parts = [
        f"<code>{html_text(origin.command)}</code>" if origin.command else "",
        html_text(origin.machine),
        f"commit {html_text(origin.commit)}" if origin.commit else "",
        html_text(origin.folder),
    ]
    joined = " · ".join(part for part in parts if part)
    return f"{html_text(lead)}{joined}" if joined else ""


def _picture(picture: Picture) -> Iterator[str]:
    caption = f"<figcaption>{html_text(picture.caption)}</figcaption>" if picture.caption else ""
    image = f'alt="{html_text(picture.alternative)}" loading="lazy"'
    if not picture.forms:
        yield f'<figure class="photo"><img src="{_data(picture.png, "png")}" {image}>{caption}</figure>'
        return
    sources = "".join(
        f'<source media="{media}" srcset="{_data(picture.forms[form], "svg+xml")}">'
        for form, media in (
            ((True, True), f"screen and {_PHONE} and {_DARK}"),
            ((True, False), f"screen and {_PHONE}"),
            ((False, True), f"screen and {_DARK}"),
        )
    )
    image = f'<img src="{_data(picture.forms[False, False], "svg+xml")}" {image}>'
    yield f"<figure><picture>{sources}{image}</picture>{caption}</figure>"


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


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

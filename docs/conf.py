"""Sphinx configuration of the documentation: `make docs` builds it into docs/_build/html."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]

project = "psannlm"
copyright = "2026, the psannlm authors"
author = "the psannlm authors"
(release,) = re.findall(
    r'^__version__ = "(.*)"$', (REPOSITORY / "psannlm" / "__init__.py").read_text(encoding="utf-8"), flags=re.MULTILINE
)
version = release

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
# Off: it would turn the two hyphens of an option into a dash.
smartquotes = False
html_theme = "furo"
html_title = f"psannlm {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]

# Documents of the repository's root that pages link to, and the pages under docs/project/ that include them.
_ROOT_DOCUMENTS = ("CHANGELOG", "CONTRIBUTING", "SECURITY")


def _link_to_pages(app: Any, docname: str, source: list[str]) -> None:
    """Point links to a document of the root, right on a forge, at the page that includes it here."""
    up = "../" * docname.count("/")
    for name in _ROOT_DOCUMENTS:
        source[0] = re.sub(rf"\]\((?:\.\./)+{name}\.md", f"]({up}project/{name.lower()}.md", source[0])


def _link_from_root(app: Any, relative_path: Path, parent: str, content: list[str]) -> None:
    """Resolve links of an included root document: `docs/...` and its neighbours in the root."""
    content[0] = content[0].replace("](docs/", "](../")
    for name in _ROOT_DOCUMENTS:
        content[0] = content[0].replace(f"]({name}.md", f"]({name.lower()}.md")


def setup(app: Any) -> None:
    """Register the link rewriting."""
    app.connect("source-read", _link_to_pages)
    app.connect("include-read", _link_from_root)

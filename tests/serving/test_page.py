"""The web page of the server: its file and headers, and what it does in a real browser."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

from psannlm.serving.page import load_page


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the content of its scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self._tag = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._tag = tag

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag in self.inline:
            self.inline[self._tag].append(data)


PAGE = load_page()
ELEMENTS = Elements(PAGE.content.decode("utf-8"))


def test_page_policy_allows_its_one_script_and_style() -> None:
    policy = PAGE.headers["Content-Security-Policy"]
    for kind, contents in ELEMENTS.inline.items():
        (content,) = contents
        digest = base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode("ascii")
        assert re.findall(rf"{kind}-src ([^;]*)", policy) == [f"'sha256-{digest}'"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy


def test_page_refers_to_nothing_outside_itself() -> None:
    """No address of another host or file, no handler or style in an attribute, which the policy would block."""
    for tag, attributes in ELEMENTS.elements:
        assert not {"src", "srcset", "action", "formaction", "style"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
        assert (attributes.get("href") or "data:").startswith("data:"), tag
    (script,), (style,) = ELEMENTS.inline["script"], ELEMENTS.inline["style"]
    assert not re.search(r"url\(|@import", style)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|localStorage", script)


def test_page_fields_have_names_and_errors() -> None:
    named = {attributes.get("for") for tag, attributes in ELEMENTS.elements if tag == "label"}
    ids = {attributes.get("id") for _, attributes in ELEMENTS.elements}
    fields = [
        attributes
        for tag, attributes in ELEMENTS.elements
        if tag in ("input", "textarea") and attributes.get("type") not in ("range", "checkbox")
    ]
    assert len(fields) >= 10
    for attributes in fields:
        assert attributes["id"] in named
        assert set((attributes.get("aria-describedby") or "").split()) <= ids
        if "readonly" not in attributes:
            assert f"{attributes['id']}-error" in (attributes["aria-describedby"] or "").split()

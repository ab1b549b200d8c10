"""The web page of the server, with the headers that let nothing but its own script and style run."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True)
class Page:
    """The page's HTML in UTF-8, and the headers to send it with."""

    content: bytes
    headers: dict[str, str]


def load_page() -> Page:
    """Return the page, with a Content-Security-Policy of the SHA-256 hashes of its script and its style.

    Whatever text a model, a link or a server puts into the page, the browser runs and loads nothing else: no other
    script, no handler in an attribute, no address of another host. Trusted types refuse text as HTML altogether.
    """
    # Line ends as a browser normalizes them before it hashes, also where a checkout has those of Windows.
    text = files("psannlm.serving").joinpath("page.html").read_text(encoding="utf-8").replace("\r\n", "\n")
    hashes = {tag: f"'sha256-{_sha256(content)}'" for tag, content in _INLINE.findall(text)}
    policy = (
        "default-src 'none'",
        f"script-src {hashes['script']}",
        f"style-src {hashes['style']}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(policy),
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }
    return Page(text.encode("utf-8"), headers)


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")

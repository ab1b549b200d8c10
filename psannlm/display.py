"""Escaping of untrusted text for terminals, Markdown, HTML, CSV, JSON, shells and YAML.

File names, run names and generated text come from others. They are shown and never interpreted: control
characters, terminal escapes, and the characters that hide or reorder text appear as escapes such as ``\\x1b``.
"""

from __future__ import annotations

import html
import json
import math
import re
import shlex
from typing import Any

# Control characters, soft hyphens, invisible and bidirectional formatting, line separators, surrogates, noncharacters
# and tags. Joiners that scripts and emoji need are left as they are.
_UNSEEN_CHARACTERS = (
    "\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f"
)
_UNSEEN = re.compile(f"[{_UNSEEN_CHARACTERS}]")
# Bytes of a file name that are not UTF-8, as os.fsdecode gives them.
_FIRST_BYTE, _LAST_BYTE, _BYTE_OFFSET = "\udc80", "\udcff", 0xDC00
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_MARKDOWN = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
_MARKDOWN_START = re.compile(r"[#+=-]|[0-9]+(?=[.)])")
_PLAIN_YAML = re.compile(r"(?!(?i:true|false|null|yes|no|on|off|y|n)\Z)[A-Za-z/][A-Za-z0-9_/.-]*")
# Python writes no whole number of more than 4,300 digits.
_MOST_BITS = 14_000


def printable(text: object, keep: str = "") -> str:
    """Return the text with every character that a terminal would interpret or hide as an escape such as ``\\x1b``.

    Bytes of a file name that are not UTF-8 appear as ``\\xe9``. Characters in ``keep`` stay; ``"\\n\\t"`` for text of
    several lines.
    """
    return _UNSEEN.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), str(text))


def _escape(character: str) -> str:
    if _FIRST_BYTE <= character <= _LAST_BYTE:
        return f"\\x{ord(character) - _BYTE_OFFSET:02x}"
    return character.encode("unicode_escape").decode("ascii")


def shortened(text: object, most: int = 300) -> str:
    """Return the text, its middle left out where it has more than ``most`` characters."""
    whole = str(text)
    if len(whole) <= most:
        return whole
    half = (most - 1) // 2
    return f"{whole[:half]}…{whole[-half:]}"


def html_text(text: object) -> str:
    """Return the text with what HTML gives a meaning escaped; line ends and tabs stay."""
    return html.escape(printable(text, keep="\n\t"), quote=True)


def markdown_text(text: object) -> str:
    """Return the text with what Markdown, and HTML in it, gives a meaning escaped, in one line and one cell."""
    joined = html.escape(printable(" ".join(str(text).split())), quote=False)
    escaped = _MARKDOWN.sub(lambda match: f"\\{match[0]}", joined)
    start = _MARKDOWN_START.match(escaped)
    if start is None:
        return escaped
    # A number is escaped at the full stop that would make it an item of a list.
    at = start.end() if start[0].isdigit() else 0
    return f"{escaped[:at]}\\{escaped[at:]}"


def markdown_code(text: object) -> str:
    """Return the text as code in Markdown; in an HTML element where it holds what Markdown cannot quote."""
    joined = printable(" ".join(str(text).split()))
    if not joined:
        return ""
    return f"<code>{markdown_text(joined)}</code>" if re.search(r"[`<>&|\\]", joined) else f"`{joined}`"


def csv_cell(value: object) -> object:
    """Return a value for a CSV cell: numbers as they are, text in a form that a spreadsheet does not evaluate."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, (int, float)):
        return value if not isinstance(value, int) or value.bit_length() <= _MOST_BITS else ""
    text = str(value)
    if text.startswith(_FORMULA_STARTS) and not _NUMBER.fullmatch(text):
        text = f"'{text}"
    return printable(text)


def json_text(content: Any, *, indent: int | None = None, is_ascii: bool = False) -> str:
    """Return ``content`` as strict JSON: null for NaN and infinities, unseen characters as escapes.

    Text reads back as it was, bytes of file names that are not UTF-8 included (as ``os.fsdecode`` gives them). What
    JSON has no form for, such as a path or a date, is written as text.
    """
    text = json.dumps(_plain(content), indent=indent, ensure_ascii=is_ascii, allow_nan=False, default=str)
    pattern = _UNSEEN if indent is None else _UNSEEN_WITHIN_LINES
    return pattern.sub(_json_escape, text)


_UNSEEN_WITHIN_LINES = re.compile(f"(?!\n)[{_UNSEEN_CHARACTERS}]")


def _json_escape(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1]


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return None
    if isinstance(value, dict):
        return {key if isinstance(key, (str, int)) else str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def yaml_scalar(text: object) -> str:
    """Return a text as YAML that is read back as that text anywhere in a flow list: plain where that is safe."""
    plain = str(text)
    if _PLAIN_YAML.fullmatch(plain):
        return plain
    # A JSON string is a YAML string, but for characters beyond U+FFFF: YAML knows no pairs of escapes.
    quoted = json.dumps(plain, ensure_ascii=False)
    return _UNSEEN.sub(lambda match: _yaml_escape(match[0]), quoted)


def _yaml_escape(character: str) -> str:
    return f"\\u{ord(character):04x}" if character <= "\uffff" else f"\\U{ord(character):08x}"


def shell_argument(text: object) -> str:
    """Return a text quoted for a POSIX shell; in bash's and zsh's ``$'...'`` where it holds unseen characters."""
    plain = str(text)
    if not _UNSEEN.search(plain.replace("\n", "")):
        return shlex.quote(plain)
    escaped = "".join(_shell_escape(character) for character in plain)
    return f"$'{escaped}'"


def _shell_escape(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if not _UNSEEN.match(character):
        return character
    # Bytes, so that they mean the same whatever the locale of the shell is.
    is_byte = _FIRST_BYTE <= character <= _LAST_BYTE
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape" if is_byte else "replace"))


def shell_command(*arguments: object) -> str:
    """Return a command to be pasted into a shell."""
    return " ".join(map(shell_argument, arguments))

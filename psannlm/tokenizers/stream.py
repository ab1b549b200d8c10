"""Line-by-line encoding and decoding of text, ids and JSON lines, in constant memory.

A line includes its newline. Text that is encoded and then decoded line by line is therefore the same, byte for byte,
whether or not the last line ends with a newline.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from psannlm.errors import PsannlmError, TokenizerError, nearest
from psannlm.tokenizers.base import Tokenizer

_MARK = b"\xef\xbb\xbf"
_IDS_KEY = "ids"
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHOWN_ID = re.compile(r"(?:\S*:)?([0-9]+)\Z")


def text_lines(lines: Iterable[bytes], name: str, errors: str = "strict") -> Iterator[str]:
    """Decode lines of bytes, without a byte order mark before the first.

    With ``errors`` ``replace``, bytes that are not UTF-8 are replaced by U+FFFD.

    Raises:
        TokenizerError: a byte is not UTF-8; names ``name``, line and byte.
    """
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(_MARK)
        if errors == "replace":
            yield line.decode("utf-8", "replace")
            continue
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            message = (
                f"{name}: line {number}: byte {error.start + 1} is 0x{byte:02X}, which is not UTF-8; convert it, or "
                "use --errors replace, which replaces it by U+FFFD"
            )
            raise TokenizerError(message) from error


def shown(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return ``piece:id`` for each id, separated by spaces; spaces in pieces are escaped. See :func:`parsed_ids`."""
    pieces = (piece.replace(" ", "\\x20") for piece in tokenizer.pieces(ids))
    return " ".join(f"{piece}:{i}" for piece, i in zip(pieces, ids, strict=True))


def parsed_ids(line: str) -> list[int]:
    """Return the ids of a line of numbers or of ``piece:id``. Raises TokenizerError for anything else."""
    ids = []
    for word in line.split():
        found = _SHOWN_ID.match(word)
        if found is None:
            raise TokenizerError(f"'{word}' is not an id; give numbers, or the output of psannlm tokenize --model")
        ids.append(int(found[1]))
    return ids


def decoded_lines(tokenizer: Tokenizer, lines: Iterable[str]) -> Iterator[str]:
    """Yield the text of each line of ids. Raises TokenizerError, which names the line, for anything else."""
    for number, line in enumerate(lines, start=1):
        yield _named(number, lambda line=line: tokenizer.decode(parsed_ids(line)))  # type: ignore[misc]


def encoded_lines(tokenizer: Tokenizer, lines: Iterable[str]) -> Iterator[list[int]]:
    """Yield the ids of each line. Raises TokenizerError, which names the line, for text that is not Unicode."""
    for number, line in enumerate(lines, start=1):
        yield _named(number, lambda line=line: tokenizer.encode(line))  # type: ignore[misc]


def encoded_json(
    tokenizer: Tokenizer, lines: Iterable[str], text_key: str = "text", errors: str = "strict"
) -> Iterator[str]:
    """Yield each line ``{"text": ...}`` as ``{"ids": [...]}``; other keys are kept in order, blank lines are dropped.

    With ``errors`` ``replace``, lone surrogates are replaced by U+FFFD.

    Raises:
        TokenizerError: a line is not such an object, or its text is not Unicode; names the line.
    """
    return _converted(lines, text_key, _IDS_KEY, lambda text: tokenizer.encode(_text(text, text_key, errors)))


def decoded_json(tokenizer: Tokenizer, lines: Iterable[str], text_key: str = "text") -> Iterator[str]:
    """Yield each line ``{"ids": [...]}`` as ``{"text": ...}``: the inverse of :func:`encoded_json`."""
    return _converted(lines, _IDS_KEY, text_key, lambda ids: tokenizer.decode(_ids(ids)))


def _converted(lines: Iterable[str], old: str, new: str, convert: Callable[[Any], Any]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.isspace():
            yield _named(number, lambda line=line: _convert(line, old, new, convert))  # type: ignore[misc]


def _convert(line: str, old: str, new: str, convert: Callable[[Any], Any]) -> str:
    try:
        record = json.loads(line)
    except (RecursionError, ValueError) as error:
        raise TokenizerError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise TokenizerError(f'must be an object such as {{"{old}": ...}}')
    if old not in record:
        raise TokenizerError(
            f"no key '{old}' among {', '.join(map(repr, list(record)[:8])) or 'none'}{nearest(old, record)}"
        )
    if new in record and new != old:
        raise TokenizerError(f"has both '{new}' and '{old}'; remove or rename one")
    changed = {new if key == old else key: convert(value) if key == old else value for key, value in record.items()}
    try:
        out = json.dumps(changed, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise TokenizerError("holds a number that JSON cannot represent (NaN or Infinity)") from error
    # Lone surrogates under other keys are kept; only ASCII JSON can represent them.
    return out if out.isascii() or _SURROGATE.search(out) is None else json.dumps(changed, allow_nan=False)


def _text(value: Any, key: str, errors: str) -> str:
    if not isinstance(value, str):
        raise TokenizerError(f"'{key}' must hold a string, not {json.dumps(value)[:40]}")
    found = None if value.isascii() else _SURROGATE.search(value)
    if found is None:
        return value
    if errors == "replace":
        return _SURROGATE.sub("\ufffd", value)
    raise TokenizerError(
        f"lone surrogate U+{ord(found[0]):04X} at character {found.start()}, which is not Unicode text; remove it, or "
        "use --errors replace, which replaces it by U+FFFD"
    )


def _ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(i) is int for i in value):
        raise TokenizerError(f"'{_IDS_KEY}' must hold a list of whole numbers, not {json.dumps(value)[:40]}")
    return value


def _named(number: int, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except PsannlmError as error:
        raise TokenizerError(f"line {number}: {error}") from error

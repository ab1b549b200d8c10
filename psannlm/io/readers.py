"""Bounded readers of text, JSON and YAML files of untrusted origin; every problem raises Unreadable with a reason."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from psannlm.io.atomic import read_head
from psannlm.io.lfs_pointers import pointer_in
from psannlm.io.limits import json_values

_LARGEST_BYTES = 32 << 20
# Of settings and of figures; parsed, each value takes some 60 bytes.
_LARGEST_YAML_BYTES = 256 << 10
_MOST_VALUES = 2 << 20
_DEEPEST = 24
# Nested keys are joined: a long key above many values would multiply the size of a file.
_LONGEST_KEY, _LONGEST_YAML_KEY = 1000, 100


class Unreadable(Exception):
    """A file cannot be read as expected; the message is the reason, without the path."""


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the bytes of a regular file of at most ``limit`` bytes; its size is checked before it is read.

    Raises:
        Unreadable: it is missing, larger, a link (what it links to may be none of the reader's business), or something
            that may block whoever opens it, such as a FIFO.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise Unreadable(f"{path.name} is not a regular file")  # a FIFO would be waited on without end
    try:
        found = path.lstat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise Unreadable(f"{path.name} cannot be read: {reason}") from error
    if stat.S_ISLNK(found.st_mode):
        raise Unreadable(f"{path.name} is a symbolic link, which a report does not follow")
    if not stat.S_ISREG(found.st_mode):
        raise Unreadable(f"{path.name} is not a regular file")
    content = b"" if found.st_size > limit else read_head(path, limit + 1)
    if max(found.st_size, len(content)) > limit:
        size = f"{limit >> 20} MiB" if limit >= 1 << 20 else f"{limit >> 10} KiB"
        raise Unreadable(f"{path.name} is larger than {size}")
    if found.st_size and not content:
        raise Unreadable(f"{path.name} cannot be read: is reading it allowed?")
    return content


def read_text(path: Path, limit: int = _LARGEST_BYTES) -> str:
    """Return the text of a regular file of at most ``limit`` bytes (32 MiB), in UTF-8.

    Raises:
        Unreadable: it is not text, or as :func:`read_bytes` does.
    """
    content = read_bytes(path, limit)
    if problem := pointer_in(content):
        raise Unreadable(f"{path.name} is {problem}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"{path.name} is not UTF-8: byte 0x{content[error.start]:02x} at {error.start:,}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, with NaN and infinities as None.

    Raises:
        Unreadable: the file is missing, damaged, nested without end, or holds something else than an object.
    """
    text = read_text(path)
    if json_values(text.encode("utf-8")) > _MOST_VALUES:
        raise Unreadable(f"{path.name} holds more than {_MOST_VALUES:,} values")
    try:
        value = json.loads(text, parse_constant=lambda word: None)
    except json.JSONDecodeError as error:
        reason = f"{path.name} is not JSON: {error.msg.lower()} (line {error.lineno}, column {error.colno})"
        raise Unreadable(reason) from error
    except (ValueError, RecursionError) as error:  # a number of more digits than Python reads, or nested without end
        raise Unreadable(f"{path.name} is not JSON that can be read") from error
    if not isinstance(value, dict):
        raise Unreadable(f"{path.name} holds no object")
    _refuse_shape(value, path, _LONGEST_KEY)
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file that a run wrote.

    Raises:
        Unreadable: as :func:`read_json`, and beyond 256 KiB; or the file holds an alias, which no run writes and which
            can grow without end.
    """
    text = read_text(path, _LARGEST_YAML_BYTES)
    try:
        _refuse_events(text, path)
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ArithmeticError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML trusts tags: "!!int x", "!!bool x" and "!!timestamp x" raise errors of its constructors.
        raise Unreadable(f"{path.name} is not YAML: {' '.join(str(error).split())[:120]}") from error
    if not isinstance(value, dict):
        raise Unreadable(f"{path.name} holds no mapping")
    _refuse_shape(value, path, _LONGEST_YAML_KEY)
    return value


def _refuse_events(text: str, path: Path) -> None:
    """Raise Unreadable for an alias, and as soon as the nesting is too deep, before parsing takes too long."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise Unreadable(f"{path.name} holds an alias, which no run writes")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise Unreadable(f"{path.name} is nested more than {_DEEPEST} levels deep")


def _refuse_shape(value: object, path: Path, longest_key: int) -> None:
    """Raise Unreadable if ``value`` is nested deeper than any file of psannlm, or has too long keys."""
    level = [value]
    for _ in range(_DEEPEST):
        keys = (key for item in level if isinstance(item, dict) for key in item)
        longest = max((len(key) for key in keys if isinstance(key, (str, bytes))), default=0)
        if longest > longest_key:
            raise Unreadable(f"{path.name} has a key of {longest:,} characters")
        level = [inner for item in level if isinstance(item, (dict, list)) for inner in _items(item)]
        if not level:
            return
    raise Unreadable(f"{path.name} is nested more than {_DEEPEST} levels deep")


def _items(value: dict[Any, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def flatten(tree: dict[Any, Any]) -> dict[str, Any]:
    """Flatten nested mappings to dotted keys; lists and empty mappings are kept."""
    return dict(_flattened(tree, ""))


def _flattened(tree: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def number(value: object) -> float | int | None:
    """Return ``value`` if it is a finite number in the range of a float (not a boolean), else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def is_spread(value: object) -> bool:
    """Return whether ``value`` is a repeated measurement: ``{"median": ..., "lowest": ..., "highest": ...}``."""
    return (
        isinstance(value, dict)
        and {"median", "lowest", "highest"} <= value.keys()
        and all(number(value[key]) is not None for key in ("median", "lowest", "highest"))
    )

"""Files that others wrote become plain data, or the reason why they cannot: whatever is in them, nothing is fatal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

_LARGEST_BYTES = 32 << 20
_DEEPEST = 24


class Unreadable(Exception):
    """A file that is not what its name promises; the message is the reason, without the path."""


def read_text(path: Path) -> str:
    """Return the text of a file of at most 32 MiB, in UTF-8.

    Raises:
        Unreadable: it is missing, larger, or not text.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
    except OSError as error:
        raise Unreadable(f"{path.name} cannot be read: {error.strerror or error}") from error
    if len(content) > _LARGEST_BYTES:
        raise Unreadable(f"{path.name} is larger than {_LARGEST_BYTES >> 20} MiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"{path.name} is not UTF-8: byte 0x{content[error.start]:02x} at {error.start:,}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, what JSON has no word for (NaN, infinities) as None.

    Raises:
        Unreadable: the file is missing, damaged, nested without end, or holds something else than an object.
    """
    text = read_text(path)
    try:
        value = json.loads(text, parse_constant=lambda word: None)
    except json.JSONDecodeError as error:
        reason = f"{path.name} is not JSON: {error.msg.lower()} (line {error.lineno}, column {error.colno})"
        raise Unreadable(reason) from error
    except (ValueError, RecursionError) as error:  # a number of more digits than Python reads, or nested without end
        raise Unreadable(f"{path.name} is not JSON that can be read") from error
    if not isinstance(value, dict):
        raise Unreadable(f"{path.name} holds no object")
    _refuse_depth(value, path)
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file that a run wrote.

    Raises:
        Unreadable: as :func:`read_json`; or the file holds an alias, which no run writes and which can grow without
            end.
    """
    text = read_text(path)
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise Unreadable(f"{path.name} holds an alias, which no run writes")
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise Unreadable(f"{path.name} is not YAML: {' '.join(str(error).split())[:120]}") from error
    if not isinstance(value, dict):
        raise Unreadable(f"{path.name} holds no mapping")
    _refuse_depth(value, path)
    return value


def _refuse_depth(value: object, path: Path) -> None:
    """Raise Unreadable where walking ``value`` would go deeper than any file of ours does."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for item in level if isinstance(item, (dict, list)) for inner in _items(item)]
        if not level:
            return
    raise Unreadable(f"{path.name} is nested more than {_DEEPEST} levels deep")


def _items(value: dict[Any, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def flatten(tree: dict[Any, Any]) -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys; lists and empty mappings stay as they are."""
    return dict(_flattened(tree, ""))


def _flattened(tree: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def number(value: object) -> float | int | None:
    """Return ``value`` if it is a finite number (and no boolean), else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def is_spread(value: object) -> bool:
    """Whether ``value`` is a repeated measurement: ``{"median": ..., "lowest": ..., "highest": ...}``."""
    return (
        isinstance(value, dict)
        and {"median", "lowest", "highest"} <= value.keys()
        and all(number(value[key]) is not None for key in ("median", "lowest", "highest"))
    )

"""Reference of all configuration keys as a Markdown table, generated from the fields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from psannlm.config.base import Section
from psannlm.config.data import BuiltinSource, PathSource
from psannlm.config.validation import SECTIONS
from psannlm.config.yaml_loader import dump_yaml

_PLAIN = {int: "whole number", float: "number", bool: "true or false", str: "text"}
_SIGNS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}
_LARGEST_SHOWN = 10**15


@dataclass(frozen=True)
class Key:
    """One documented key: dotted path, type, default and description."""

    path: str
    kind: str
    default: str
    description: str


def keys() -> Iterator[Key]:
    """Yield every documented key in the order of the sections; the keys of sources are below ``[]``."""
    for name, cls in SECTIONS.items():
        yield from _keys_of(name, cls)


def markdown_table() -> str:
    """Return the Markdown table of all keys, with a final newline."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    rows += [
        f"| `{key.path}` | {_cell(key.kind)} | {_cell(f'`{key.default}`' if key.default else 'required')} "
        f"| {_cell(key.description)} |"
        for key in keys()
    ]
    return "\n".join(rows) + "\n"


def _keys_of(path: str, cls: type[Section]) -> Iterator[Key]:
    for name, field in cls.model_fields.items():
        here = f"{path}.{name}"
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from _keys_of(here, inner)
            continue
        yield Key(here, _words(inner, field.metadata), _default(field), field.description or "")
        if here == "data.sources":
            # Both kinds of source have a weight: each key is listed once.
            yield from {
                key.path: key for kind in (PathSource, BuiltinSource) for key in _keys_of(f"{here}[]", kind)
            }.values()


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return ""
    if isinstance(value, tuple):
        value = [item.model_dump(mode="json") if isinstance(item, Section) else item for item in value]
        inner = ", ".join(_inline(item) for item in value)
        return f"[{inner}]"
    return _inline(value)


def _inline(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_inline(item)}" for key, item in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else dump_yaml(value).removesuffix("...\n").strip()


def _words(annotation: Any, metadata: list[Any]) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(args[0], [*args[1:], *metadata])
    if origin is Literal:
        return " \\| ".join(f"`{choice}`" for choice in args)
    if origin in (Union, UnionType):
        choices = [_words(choice, metadata) for choice in args if choice is not type(None)]
        return " or ".join([*dict.fromkeys(choices), *(["null"] if type(None) in args else [])])
    if origin is tuple:
        if args[1:] == (Ellipsis,):
            return f"list of {_words(args[0], [])}"
        return f"[{', '.join(_words(item, []) for item in args)}]"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "`{" + ", ".join(f"{name}: ..." for name in annotation.model_fields) + "}`"
    return f"{_PLAIN[annotation]}{_range(metadata)}"


def _range(metadata: list[Any]) -> str:
    limits: list[str] = []
    for item in metadata:
        inner = item.metadata if isinstance(item, FieldInfo) else [item]
        for limit in inner:
            if type(limit) in _SIGNS:
                name, sign = _SIGNS[type(limit)]
                value = getattr(limit, name)
                if value < _LARGEST_SHOWN:
                    limits.append(f"{sign} {value:g}")
    return f" {' and '.join(dict.fromkeys(limits))}" if limits else ""


def _cell(text: str) -> str:
    """Escape a bar, which would end the cell; bars already escaped stay as they are."""
    return text.replace("\\|", "|").replace("|", "\\|").replace("\n", " ")

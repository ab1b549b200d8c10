"""JSON Schema of a configuration file, for editors: from the same fields as the table of keys in the README.

A schema describes single values. Only :func:`psannlm.config.run.load_config` checks rules across fields (``n_heads``
divides ``d_model``) and that files exist.
"""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from psannlm.config.base import Section
from psannlm.config.data import BuiltinSource, DataConfig, PathSource
from psannlm.config.run import RunConfig
from psannlm.config.train import TrainConfig
from psannlm.config.validation import SECTIONS

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
CONFIG_TITLE = "psannlm configuration"
# The configuration reads YAML 1.2, where these words are text; the loader takes them as YAML 1.1 did.
_ON_WORDS = r"[Yy][Ee][Ss]|[Oo][Nn]|[Tt][Rr][Uu][Ee]"
_OFF_WORDS = r"[Nn][Oo]|[Oo][Ff][Ff]|[Ff][Aa][Ll][Ss][Ee]"
_NULL: Schema = {"type": "null"}
_PLAIN: dict[type, Schema] = {int: {"type": "integer"}, float: {"type": "number"}, str: {"type": "string"}}
_LIMITS = {Ge: ("ge", "minimum"), Gt: ("gt", "exclusiveMinimum"), Le: ("le", "maximum"), Lt: ("lt", "exclusiveMaximum")}
# The bound of 64-bit integers is left out: editors would show it for every whole number.
_LARGEST_SHOWN = 10**15


def config_schema() -> Schema:
    """Return the JSON Schema (draft 2020-12) of a configuration file."""
    return {
        "$schema": DIALECT,
        "title": CONFIG_TITLE,
        "description": "Model, corpus and training run of psannlm train.",
        "type": "object",
        "properties": {
            name: {"description": RunConfig.model_fields[name].description, **or_null(section_schema(cls))}
            for name, cls in SECTIONS.items()
        },
        "additionalProperties": False,
    }


def section_schema(cls: type[Section], without: tuple[str, ...] = ()) -> Schema:
    """Return the schema of a group of keys.

    Args:
        without: keys that are refused here although the section has them.
    """
    properties: Schema = {}
    required: list[str] = []
    for name, field in cls.model_fields.items():
        if name in without:
            continue
        properties[name] = _property(cls, name, field)
        if field.is_required():
            required.append(name)
    schema: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    former = {old: new for old, new in cls.former_keys.items() if new in properties}
    for old, new in former.items():
        properties[old] = {**properties[new], "description": f"former name of {new}", "deprecated": True}
    if former:
        # A key under both of its names is refused.
        schema["not"] = {"anyOf": [{"required": [old, new]} for old, new in former.items()]}
    return {**schema, "required": required} if required else schema


def value_schema(annotation: Any, metadata: list[Any]) -> Schema:
    """Return the schema of a type, with the limits and patterns in ``metadata``.

    Raises:
        TypeError: the type has no counterpart here yet.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return value_schema(args[0], [*args[1:], *metadata])
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, UnionType):
        choices = [_NULL if choice is type(None) else value_schema(choice, metadata) for choice in args]
        return any_of(*choices)
    if origin is tuple:
        if args[1:] == (Ellipsis,):
            return {"type": "array", "items": value_schema(args[0], [])}
        items = [value_schema(item, []) for item in args]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if origin is dict:
        return {"type": "object"}
    if annotation is bool:
        return switch(_ON_WORDS, _OFF_WORDS)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return section_schema(annotation)
    if annotation not in _PLAIN:
        raise TypeError(f"no JSON Schema is known for {annotation!r}")
    return {**_PLAIN[annotation], **_limits(metadata)}


def any_of(*choices: Schema) -> Schema:
    """Return the schema of what any of the given ones accepts."""
    flat = [inner for choice in choices for inner in (choice["anyOf"] if list(choice) == ["anyOf"] else [choice])]
    return {"anyOf": flat}


def or_null(schema: Schema) -> Schema:
    """Return a schema that accepts null too, as YAML has it where all keys of a group are commented out."""
    return any_of(schema, _NULL)


def switch(*words: str) -> Schema:
    """Return the schema of true and false and of the words, given as regular expressions, that stand for them."""
    return any_of({"type": "boolean"}, {"type": "string", "pattern": rf"^\s*({'|'.join(words)})\s*$"})


def _property(cls: type[Section], name: str, field: FieldInfo) -> Schema:
    is_group = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    schema = _sources() if (cls, name) == (DataConfig, "sources") else value_schema(field.annotation, field.metadata)
    schema = _as_the_loader_reads(cls, name, or_null(schema) if is_group else schema)
    described: Schema = {"description": field.description or "", **schema}
    default = field.default
    if default is not PydanticUndefined:
        described["default"] = _json_value(default)
    return described


def _as_the_loader_reads(cls: type[Section], name: str, schema: Schema) -> Schema:
    """Add what a field accepts before its type is checked (the validators of ``TrainConfig`` with mode="before")."""
    if cls is not TrainConfig:
        return schema
    if name == "amp":
        return or_null(schema)
    if name == "ddp":
        return any_of(schema, switch(_ON_WORDS, _OFF_WORDS))
    if name == "fsdp":
        return any_of(schema, {"const": False}, {"type": "string", "pattern": rf"^\s*({_OFF_WORDS})\s*$"})
    if name.endswith("_interval_steps"):
        return any_of({"type": "integer", "minimum": 0}, _NULL)
    return schema


def _sources() -> Schema:
    path = {"type": "string", "minLength": 1}
    source = any_of(path, section_schema(PathSource), section_schema(BuiltinSource))
    return any_of(source, {"type": "array", "items": source, "minItems": 1})


def _limits(metadata: list[Any]) -> Schema:
    limits: Schema = {}
    for item in metadata:
        if isinstance(item, FieldInfo):
            limits |= _limits(item.metadata)
        elif type(item) in _LIMITS:
            attribute, key = _LIMITS[type(item)]
            limit = getattr(item, attribute)
            if limit < _LARGEST_SHOWN:
                # The stricter one of two: a field's own limit beside that of its type.
                is_lower = key.lower().endswith("minimum")
                limits[key] = limit if key not in limits else (max if is_lower else min)(limit, limits[key])
        elif isinstance(item, MinLen):
            limits["minLength"] = item.min_length
        elif pattern := getattr(item, "pattern", None):
            limits["pattern"] = pattern
    return limits


def _json_value(value: object) -> object:
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    return [_json_value(item) for item in value] if isinstance(value, (list, tuple)) else value

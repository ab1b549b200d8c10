"""Validation of configuration sections, with all issues as readable messages."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from psannlm.config.advice import Due, advice
from psannlm.config.base import Check, Section
from psannlm.config.data import BuiltinSource, DataConfig, PathSource
from psannlm.config.model import ModelConfig
from psannlm.config.train import DEEPSPEED_KEYS, NO_DEEPSPEED, TrainConfig
from psannlm.config.yaml_loader import KeyPath
from psannlm.errors import nearest

SECTIONS: dict[str, type[Section]] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
S = TypeVar("S", bound=Section)

_SOURCE_KINDS: dict[str, type[Section]] = {"path": PathSource, "builtin": BuiltinSource}

# Names of keys in other trainers that are not similar enough for a suggestion by spelling.
_NAMES_ELSEWHERE = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "gradient_accumulation_steps": "grad_accum_steps",
    "gradient_checkpointing": "grad_checkpoint",
    "max_grad_norm": "grad_clip",
    "precision": "amp",
    "output_dir": "checkpoint_dir",
    "out_dir": "checkpoint_dir",
    "eval_interval": "eval_interval_steps",
    "save_steps": "save_interval_steps",
    "logging_steps": "log_interval_steps",
    "block_size": "max_length",
    "seq_len": "max_length",
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "n_embd": "d_model",
    "hidden_size": "d_model",
}

_LONGEST_SHOWN = 120


class _YamlRepr(reprlib.Repr):
    """Short representation of a value, with YAML's true, false and null at any depth."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 60

    def repr1(self, x: Any, level: int) -> str:
        """Return the representation of ``x``, ``level`` levels deep."""
        if x is None or isinstance(x, bool):
            return {None: "null", True: "true", False: "false"}[x]
        if isinstance(x, float):
            return f"{x:g}" if x == float(f"{x:g}") else repr(x)
        return super().repr1(x, level)


_reprlib = _YamlRepr()


@dataclass(frozen=True)
class ConfigIssue:
    """One issue of a configuration: the path of its key and the message; ``is_unknown_key``: the key does not exist."""

    path: KeyPath
    message: str
    is_unknown_key: bool = False


@dataclass(frozen=True)
class Examined(Generic[S]):
    """A section, with the default in place of every invalid value, and the issues."""

    section: S
    issues: tuple[ConfigIssue, ...]


def examine(cls: type[S], at: KeyPath, value: object) -> Examined[S]:
    """Validate ``value`` (a mapping, a section, or None for all defaults) as the section ``cls`` found at ``at``.

    Rules across fields are checked where all the fields involved are valid, so that they are reported together with
    the errors of single fields and never because of one.
    """
    if isinstance(value, cls):
        return Examined(value, ())
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        return Examined(cls(), (ConfigIssue(at, f"{show(value)} is not a group of keys; put its keys below it"),))
    issues = [ConfigIssue((*at, *place), message) for place, message in _doubled(cls, value)]
    given = _tidied(cls, value)
    try:
        section = cls.model_validate(given, context={"collect": True})
    except ValidationError as error:
        found: dict[KeyPath, ConfigIssue] = {}
        errors = error.errors(include_url=False)
        misspelt = {details["loc"][:-1] for details in errors if details["type"] == "extra_forbidden"}
        for details in errors:
            if details["type"] == "missing" and details["loc"][:-1] in misspelt:
                # The required key is most likely misspelled; its value is dropped with the unknown key.
                given = _pruned(cls, given, details["loc"])
                continue
            place = _Place.find(cls, details["loc"])
            # Pydantic reports each branch of a union; the user wrote one value.
            same = [other for other in errors if _Place.find(cls, other["loc"]).path == place.path]
            issue = _translate(place, at, same, given)
            found.setdefault(issue.path, issue)
        issues += found.values()
        for issue in found.values():
            given = _pruned(cls, given, issue.path[len(at) :])
        section = cls.model_validate(given, context={"collect": True})
    refused = {issue.path for issue in issues}
    for path, check in section_checks(section, at):
        if not any(touches(refused, (*path, *name.split("."))) for name in check.fields):
            issues.append(ConfigIssue((*path, *check.fields[0].split(".")), check.message))
    return Examined(section, tuple(issues))


def section_checks(section: Section, at: KeyPath) -> Iterator[tuple[KeyPath, Check]]:
    """Yield the violated rules of a section and of its groups, each with the path of the group."""
    for check in section.checks():
        yield at, check
    for name in type(section).model_fields:
        inner = getattr(section, name)
        if isinstance(inner, Section):
            yield from section_checks(inner, (*at, name))


def touches(refused: set[KeyPath], path: KeyPath) -> bool:
    """Return whether a refused path is equal to, above or below ``path``."""
    return any(bad[: len(path)] == path or path[: len(bad)] == bad for bad in refused)


def dotted(path: KeyPath) -> str:
    """Return a path in dotted notation: ``data.sources[0].path``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            shown = part if re.fullmatch(r"[\w<>-]{1,60}", part) else _reprlib.repr(part)
            text += f".{shown}" if text else shown
    return text


def show(value: object) -> str:
    """Return a value in YAML notation, on one short line."""
    text = re.sub(r"\s*\n\s*", " ", _reprlib.repr(value))
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


def unknown_section(key: str) -> ConfigIssue:
    """Return the issue of a top-level key that is not a section."""
    owners = _owners(key)
    if owners:
        hint = f"it belongs to {' or to '.join(owners)}"
    elif "." in key:
        head, tail = key.split(".", 1)
        hint = f"write {tail} below {head}:" if head in SECTIONS else f"the sections are {', '.join(SECTIONS)}"
    else:
        hint = f"the sections are {', '.join(SECTIONS)}"
    return ConfigIssue((key,), f"unknown section{nearest(key, SECTIONS)}; {hint}", True)


def _doubled(cls: type[Section], given: Mapping[object, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Yield the path and a message for each key that ``given`` holds under its former and its present name."""
    for former, message in cls.doubled_keys(given).items():
        yield (former,), message
    for name, value in given.items():
        group = _group_class(cls, str(name))
        if group is not None and isinstance(value, Mapping):
            yield from (((str(name), *place), message) for place, message in _doubled(group, value))


def present_path(path: KeyPath) -> KeyPath:
    """Return ``path``, at whatever depth its section is, with former keys replaced by their present names."""
    renamed = list(path)
    for at, (section, key) in enumerate(pairwise(path), 1):
        if isinstance(key, str) and section in SECTIONS:
            renamed[at] = SECTIONS[str(section)].former_keys.get(key, key)
    return tuple(renamed)


def with_present_keys(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections with former keys under their present names, so that they merge with later changes."""
    return {
        name: SECTIONS[name].with_present_keys(value) if name in SECTIONS and isinstance(value, Mapping) else value
        for name, value in sections.items()
    }


def _tidied(cls: type[Section], given: Mapping[object, Any]) -> dict[str, Any]:
    """Return ``given`` with all keys as text, without groups that are null because all their keys are commented out."""
    tidied: dict[str, Any] = {}
    for key, value in cls.with_present_keys(given).items():
        if key in cls.former_keys:
            continue  # reported by `_doubled`; the present key counts
        name = key if isinstance(key, str) else show(key)
        group = _group_class(cls, name)
        if group is None or not (value is None or isinstance(value, Mapping)):
            tidied[name] = value
        elif value is not None:
            tidied[name] = _tidied(group, value)
    return tidied


def _group_class(cls: type[Section], name: str) -> type[Section] | None:
    field = cls.model_fields.get(name)
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _pruned(cls: type[Section], given: dict[str, Any], path: KeyPath) -> dict[str, Any]:
    """Return ``given`` without the field at ``path``; within lists, without the list."""
    name = str(path[0])
    group = _group_class(cls, name)
    rest = dict(given)
    if group is not None and len(path) > 1 and isinstance(rest.get(name), Mapping):
        rest[name] = _pruned(group, rest[name], path[1:])
    else:
        rest.pop(name, None)
    return rest


@dataclass(frozen=True)
class _Place:
    """Location of an error: its path in the file, the classes that own the key, and the field if there is one.

    Pydantic's own path also names the tags and branches of unions, which are not in the file.
    """

    path: KeyPath
    owners: tuple[type[Section], ...]
    field: FieldInfo | None

    @classmethod
    def find(cls, section: type[Section], loc: KeyPath) -> _Place:
        path: list[str | int] = []
        owner, field = section, None
        for depth, part in enumerate(loc):
            if depth == 2 and section is DataConfig and loc[0] == "sources" and part in _SOURCE_KINDS:
                owner, field = _SOURCE_KINDS[str(part)], None
                continue
            if isinstance(part, str) and depth and field is not None:
                group = _group_class(owner, str(path[-1]))
                if group is None:
                    # Below a plain field are the keys of a mapping, or the branches of a union.
                    if get_origin(field.annotation) is dict:
                        path.append(part)
                    break
                owner = group
            path.append(part)
            if isinstance(part, str):
                field = owner.model_fields.get(part)
        owners = (owner, *_SOURCE_KINDS.values()) if owner in _SOURCE_KINDS.values() else (owner,)
        return cls(tuple(path), owners, field)

    def accepts(self, given: Mapping[str, Any], value: object) -> bool:
        """Return whether ``value`` would be valid here, the rest of ``given`` unchanged."""
        names = [at for at, part in enumerate(self.path) if isinstance(part, str)]
        if self.field is None or not names:
            return False
        name, indices = str(self.path[names[-1]]), self.path[names[-1] + 1 :]
        if indices:
            items: Any = given
            for part in self.path[:-1]:
                items = items.get(part) if isinstance(items, Mapping) else None
            if not isinstance(items, (list, tuple)) or len(indices) > 1:
                return False
            index = int(indices[0])
            value = [*items[:index], value, *items[index + 1 :]]
        try:
            self.owners[0].model_validate({name: value}, context={"collect": True})
        except ValidationError as error:
            wrong = [details["loc"] for details in error.errors(include_url=False) if details["loc"][:1] == (name,)]
            return not any(loc[1:2] == indices[:1] or len(loc) == 1 for loc in wrong) if indices else not wrong
        return True


def _translate(place: _Place, at: KeyPath, errors: Sequence[ErrorDetails], given: Mapping[str, Any]) -> ConfigIssue:
    where = (*at, *place.path)
    details = errors[0]
    if details["type"] == "extra_forbidden":
        return ConfigIssue(where, _unknown_key(place.owners, at, str(place.path[-1])), True)

    def accepts(value: object) -> bool:
        return place.accepts(given, value)

    return ConfigIssue(where, _sentence(errors, place.field, accepts))


def _unknown_key(owner: tuple[type[Section], ...], at: KeyPath, key: str) -> str:
    if owner[0] is BuiltinSource and key in PathSource.model_fields:
        return "a source is either a path or builtin, not both"
    if key == "<<":
        return "merge keys are not part of YAML 1.2; write the keys out"
    if key in DEEPSPEED_KEYS:
        return NO_DEEPSPEED
    known = [name for cls in owner for name in cls.model_fields]
    if (ours := _NAMES_ELSEWHERE.get(key)) in known:
        return f"unknown key (did you mean '{ours}'?)"
    close = nearest(key, known)
    owners = _owners(key)
    if owners:
        return f"unknown key here; {key} belongs to {' or to '.join(owners)}"
    if close:
        return f"unknown key{close}"
    names = {name for _, group in _groups() for name in group.model_fields}
    if matches := get_close_matches(key, sorted(names), n=1):
        return (
            f"unknown key here (did you mean '{matches[0]}', which belongs to {' or to '.join(_owners(matches[0]))}?)"
        )
    return f"unknown key; known here: {', '.join(dict.fromkeys(known))}"


def _groups() -> Iterator[tuple[str, type[Section]]]:
    for section, cls in SECTIONS.items():
        yield section, cls
        for name in cls.model_fields:
            if group := _group_class(cls, name):
                yield f"{section}.{name}", group


def _owners(key: str) -> list[str]:
    return [name for name, group in _groups() if key in group.model_fields]


def _sentence(errors: Sequence[ErrorDetails], field: FieldInfo | None, accepts: Callable[[object], bool]) -> str:
    details = errors[0]
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    shown = show(value)
    if value == "" and kind not in ("literal_error", "int_type", "float_type", "bool_type"):
        return "is empty; give it a value, or drop the key"
    if kind in ("too_long", "too_short", "missing") and isinstance(details["loc"][-1], int):
        return f"{shown} holds too few items; it takes [lowest, highest]"
    if kind in ("too_long", "too_short"):
        return f"{shown} holds {context['actual_length']} items; it takes {context.get('max_length', 'more')}"
    if kind == "missing":
        return "missing; it must be given"
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        is_percentage = kind.startswith("less_than") and context[name] == 1
        return f"{shown} is {words} {show(context[name])}{advice(value, accepts) if is_percentage else ''}"
    is_choice = any(error["type"] in ("literal_error", "string_pattern_mismatch") for error in errors)
    if is_choice or (field is not None and _has_pattern(field)):
        return f"{shown} is not one of {_choices(errors, field)}{_hint_of_choice(value, errors, accepts)}"
    if kind in _WANTED:
        hint = advice(value, accepts, _DUE.get(kind, "value"))
        if not hint and value is None and field is not None and not field.is_required():
            hint = f"; drop the key for its default, {show(field.get_default(call_default_factory=True))}"
            hint = hint if isinstance(field.default, (bool, int, float, str)) else "; drop the key for its default"
        elif hint and kind == "string_type" and isinstance(value, (bool, int, float)):
            hint = f'; quote it: "{show(value)}"'
        return f"{shown} is not {_WANTED[kind]}{hint or _TAKES.get(kind, '') or _takes(kind, field)}"
    return f"{shown}: {details['msg'][:1].lower()}{details['msg'][1:]}"


def _takes(kind: str, field: FieldInfo | None) -> str:
    """Return a description of the items of a list, or ''."""
    if kind != "tuple_type" or field is None:
        return ""
    branches = [field.annotation, *get_args(field.annotation)]
    (items, *more), *_ = [get_args(branch) for branch in branches if get_origin(branch) is tuple] or [("", "")]
    if more and more != [Ellipsis]:
        return "; it takes [lowest, highest]"
    names = get_args(items) if get_origin(items) is Literal else ()
    return f"; it takes a list of {', '.join(names)}" if names else ""


def _choices(errors: Sequence[ErrorDetails], field: FieldInfo | None) -> str:
    """Return the allowed values as text: the literals of all branches, true and false, null."""
    allowed = [name for error in errors for name in _literals(error)]
    if any(error["type"].startswith("bool_") for error in errors):
        allowed += ["true", "false"]
    if not allowed and field is not None:
        return str(field.description)
    is_item = isinstance(errors[0]["loc"][-1], int)
    if field is not None and not is_item and type(None) in get_args(field.annotation):
        allowed.append("null")
    return ", ".join(allowed)


def _literals(error: ErrorDetails) -> list[str]:
    return (
        re.findall(r"'([^']*)'", error.get("ctx", {}).get("expected", "")) if error["type"] == "literal_error" else []
    )


def _hint_of_choice(value: object, errors: Sequence[ErrorDetails], accepts: Callable[[object], bool]) -> str:
    allowed = [name for error in errors for name in _literals(error)]
    named: list[object] = [*allowed, *([True, False] if len(errors) > 1 else [])]
    if hint := advice(value, lambda other: other in named and accepts(other)) or advice(value, accepts):
        return hint
    close = nearest(value, allowed) if isinstance(value, str) else ""
    return close or (f"; write {allowed[0]}" if len(allowed) == 1 and len(errors) == 1 else "")


def _has_pattern(field: FieldInfo) -> bool:
    return any(getattr(item, "pattern", None) is not None for item in field.metadata)


_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of a size that fits",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "a group of keys",
    "model_attributes_type": "a group of keys",
    "dict_type": "a group of keys",
    "union_tag_not_found": "a source",
}
_DUE: dict[str, Due] = {
    "int_type": "whole number",
    "int_parsing": "whole number",
    "int_from_float": "whole number",
    "tuple_type": "list",
    "model_type": "group",
    "model_attributes_type": "group",
}
_TAKES = {
    "model_type": "; put its keys below it",
    "model_attributes_type": "; put its keys below it",
    "dict_type": "; put its keys below it",
    "union_tag_not_found": "; it takes a path, {path: ...} or {builtin: python-reference}",
}
_BOUNDS = {
    "greater_than": ("gt", "too small: it must be greater than"),
    "greater_than_equal": ("ge", "too small: it must be at least"),
    "less_than": ("lt", "too large: it must be less than"),
    "less_than_equal": ("le", "too large: it must be at most"),
}

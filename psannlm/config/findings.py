"""Values come in, a valid section and everything wrong with the values comes out, in sentences for people."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Generic, TypeVar, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from psannlm.config.base import Check, Section
from psannlm.config.data import BuiltinSource, DataConfig, PathSource
from psannlm.config.model import ModelConfig
from psannlm.config.train import TrainConfig
from psannlm.config.yaml_tree import KeyPath, read_number
from psannlm.errors import nearest

SECTIONS: dict[str, type[Section]] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
S = TypeVar("S", bound=Section)

_SOURCE_KINDS: dict[str, type[Section]] = {"path": PathSource, "builtin": BuiltinSource}

# What other trainers call a key: too far from ours in letters for a near match.
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

_WORDS_FOR_TRUE = {"yes", "on", "y", "1"}
_WORDS_FOR_FALSE = {"no", "off", "n", "0"}
_LONGEST_SHOWN = 120
_reprlib = reprlib.Repr()
_reprlib.maxstring = _reprlib.maxother = _reprlib.maxlong = 60


@dataclass(frozen=True)
class Finding:
    """One thing wrong at one place; ``is_unknown_key`` sets a name nobody knows apart from a value that is refused."""

    path: KeyPath
    message: str
    is_unknown_key: bool = False


@dataclass(frozen=True)
class Examined(Generic[S]):
    """A section with every refused value replaced by its default, and what was refused."""

    section: S
    findings: tuple[Finding, ...]


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
        return Examined(cls(), (Finding(at, f"{show(value)} is not a group of keys; write its keys below it"),))
    findings: list[Finding] = []
    given = _tidied(cls, value)
    try:
        section = cls.model_validate(given, context={"collect": True})
    except ValidationError as error:
        found: dict[KeyPath, Finding] = {}
        errors = error.errors(include_url=False)
        misspelt = {details["loc"][:-1] for details in errors if details["type"] == "extra_forbidden"}
        for details in errors:
            if details["type"] == "missing" and details["loc"][:-1] in misspelt:
                # The required key is most likely there under the wrong name, and its value is still to be dropped.
                given = _pruned(cls, given, details["loc"])
                continue
            finding = _translate(cls, at, details)
            found.setdefault(finding.path, finding)
        findings += found.values()
        for finding in found.values():
            given = _pruned(cls, given, finding.path[len(at) :])
        section = cls.model_validate(given, context={"collect": True})
    refused = {finding.path for finding in findings}
    for path, check in section_checks(section, at):
        if not any(touches(refused, (*path, *name.split("."))) for name in check.fields):
            findings.append(Finding((*path, *check.fields[0].split(".")), check.message))
    return Examined(section, tuple(findings))


def section_checks(section: Section, at: KeyPath) -> Iterator[tuple[KeyPath, Check]]:
    """Yield the broken rules of a section and of the groups in it, each with the path its fields start at."""
    for check in section.checks():
        yield at, check
    for name in type(section).model_fields:
        inner = getattr(section, name)
        if isinstance(inner, Section):
            yield from section_checks(inner, (*at, name))


def touches(refused: set[KeyPath], path: KeyPath) -> bool:
    """Tell whether a refused place lies at, above or below ``path``."""
    return any(bad[: len(path)] == path or path[: len(bad)] == bad for bad in refused)


def dotted(path: KeyPath) -> str:
    """Return a path as people write it: ``data.sources[0].path``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            shown = part if re.fullmatch(r"[\w<>-]{1,60}", part) else _reprlib.repr(part)
            text += f".{shown}" if text else shown
    return text


def show(value: object) -> str:
    """Return a value as YAML would spell it, on one short line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}" if value == float(f"{value:g}") else repr(value)
    text = re.sub(r"\s*\n\s*", " ", _reprlib.repr(value))
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


def unknown_section(key: str) -> Finding:
    """Return the finding for a top-level key that is no section."""
    owners = _owners(key)
    if owners:
        hint = f"it belongs to {' or to '.join(owners)}"
    elif "." in key:
        head, tail = key.split(".", 1)
        hint = f"write {tail} below {head}:" if head in SECTIONS else f"the sections are {', '.join(SECTIONS)}"
    else:
        hint = f"the sections are {', '.join(SECTIONS)}"
    return Finding((key,), f"unknown section{nearest(key, SECTIONS)}; {hint}", True)


def _tidied(cls: type[Section], given: Mapping[object, Any]) -> dict[str, Any]:
    """Return ``given`` with text for every key, and without groups whose keys are all commented out (null in YAML)."""
    tidied: dict[str, Any] = {}
    for key, value in given.items():
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


def _translate(cls: type[Section], at: KeyPath, details: ErrorDetails) -> Finding:
    path = details["loc"]
    owner, field = _resolve(cls, path)
    # The tag of a union stands in pydantic's path, but nowhere in the file.
    if path[:1] == ("sources",) and len(path) > 2 and path[2] in _SOURCE_KINDS:
        path = (*path[:2], *path[3:])
    where = (*at, *path)
    if details["type"] == "extra_forbidden":
        return Finding(where, _unknown_key(owner, at, str(path[-1])), True)
    return Finding(where, _sentence(details, field))


def _resolve(cls: type[Section], path: KeyPath) -> tuple[tuple[type[Section], ...], FieldInfo | None]:
    """Return the classes that own the last key of ``path``, and the field it leads to where there is one."""
    owner: type[Section] = cls
    field: FieldInfo | None = None
    for depth, part in enumerate(path):
        if cls is DataConfig and path[0] == "sources" and depth == 2:
            owner = _SOURCE_KINDS.get(str(part), owner)
            field = None
        elif isinstance(part, str):
            field = owner.model_fields.get(part, field if depth and isinstance(path[depth - 1], int) else None)
            if depth + 1 < len(path):
                owner = _group_class(owner, part) or owner
    if owner in _SOURCE_KINDS.values():
        return (owner, *_SOURCE_KINDS.values()), field
    return (owner,), field


def _unknown_key(owner: tuple[type[Section], ...], at: KeyPath, key: str) -> str:
    if owner[0] is BuiltinSource and key in PathSource.model_fields:
        return "a source is either a path or builtin, not both"
    if key == "<<":
        return "merge keys are not part of YAML 1.2; write the keys out"
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


def _sentence(details: ErrorDetails, field: FieldInfo | None) -> str:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    shown = show(value)
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        null = ["null"] if field is not None and type(None) in get_args(field.annotation) else []
        close = nearest(value, allowed) if isinstance(value, str) else ""
        return f"{shown} is not one of {', '.join(allowed + null)}{close}"
    if kind in _WANTED:
        return f"{shown} is not {_WANTED[kind]}{_hint(kind, value)}"
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"{shown} is {words} {show(context[name])}"
    if kind in ("too_long", "too_short", "missing") and isinstance(details["loc"][-1], int):
        return f"{shown} holds too few items; write [lowest, highest]"
    if value == "":
        return "is empty; write something, or drop the key"
    if kind in ("too_long", "too_short"):
        return f"{shown} holds {context['actual_length']} items; write {context.get('max_length', 'more')}"
    if kind == "missing":
        return "missing; it must be given"
    if kind == "string_pattern_mismatch" and field is not None:
        return f"{shown} is not one of {field.description}"
    return f"{shown}: {details['msg'][:1].lower()}{details['msg'][1:]}"


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
    "union_tag_not_found": "a source; write a path, {path: ...} or {builtin: python-reference}",
}
_BOUNDS = {
    "greater_than": ("gt", "too small: it must be greater than"),
    "greater_than_equal": ("ge", "too small: it must be at least"),
    "less_than": ("lt", "too large: it must be less than"),
    "less_than_equal": ("le", "too large: it must be at most"),
}


def _hint(kind: str, value: object) -> str:
    if kind.startswith(("int_", "float_")) and isinstance(value, str):
        if read_number(value) is not None:
            return "; remove the quotes"
        plain = re.sub(r"(?<=[0-9])[_,](?=[0-9])", "", value)
        return f"; write {plain}" if plain != value and read_number(plain) is not None else ""
    if kind.startswith("bool_"):
        word = str(value).lower()
        if word in _WORDS_FOR_TRUE:
            return "; write true"
        return "; write false" if word in _WORDS_FOR_FALSE else ""
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        return f'; quote it: "{show(value)}"'
    if kind == "tuple_type" and isinstance(value, (str, int, float)):
        return f"; write [{value}]"
    return ""

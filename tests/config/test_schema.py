"""The JSON Schema of configurations accepts what the loader accepts, and refuses what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from psannlm.config.base import Section
from psannlm.config.run import RunConfig, config_from_mapping, to_yaml
from psannlm.config.schema import config_schema, section_schema, value_schema
from psannlm.config.validation import SECTIONS
from psannlm.config.yaml_loader import parse_yaml, read_yaml
from psannlm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(
    path
    for folder in ("configs", "examples")
    for path in (ROOT / folder).rglob("*.yaml")
    if isinstance(value := read_yaml(path).value, dict) and "variants" not in value
)
# Values that a person may write anywhere; each is tried at each key.
PROBES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3.0, 0.5, 0.999, 1.5, 260, 261, 10**7, 2**62),
    *("", "x", "3", "yes", " Off ", "TRUE", "auto", "full", "on", "skip", "cuda:0", "cuda:", "bf16", "rope", "none"),
    *([], ["x"], [""], [None], [1, 2], [0.5, 1], [1, 2, 3], ["amplitude"], ["attention", "mlp"], [[]]),
    *({}, {"a": 1}, {"path": "a"}, {"path": ""}, {"builtin": "python-reference"}, {"builtin": "x"}),
    *([{"path": "a", "per_line": "no"}], [{"path": "a", "builtin": "python-reference"}], [{"per_line": True}, "a"]),
]


def is_valid(value: object) -> bool:
    return bool(Draft202012Validator(config_schema()).is_valid(value))


def plain_keys(cls: type[Section]) -> Iterator[tuple[type[Section], str]]:
    for name, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from plain_keys(field.annotation)
        else:
            yield cls, name


KEYS = [pair for cls in SECTIONS.values() for pair in plain_keys(cls)]


def test_schema_itself_is_valid_draft_2020_12() -> None:
    schema = config_schema()
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == Draft202012Validator.META_SCHEMA["$id"]


@pytest.mark.parametrize(("cls", "name"), KEYS, ids=lambda part: part if isinstance(part, str) else part.__name__)
def test_schema_agrees_with_loader_on_every_key(cls: type[Section], name: str) -> None:
    validator = Draft202012Validator(section_schema(cls))
    for value in PROBES:
        try:
            cls.model_validate({name: value}, context={"collect": True})
            is_accepted = True
        except ValidationError:
            is_accepted = False
        if (cls.__name__, name, value) == ("DataConfig", "sources", []):
            is_accepted = False  # a rule of the section, not of the field
        assert validator.is_valid({name: value}) == is_accepted, value


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_configurations_validate(path: Path) -> None:
    assert [error.message for error in Draft202012Validator(config_schema()).iter_errors(read_yaml(path).value)] == []


def test_whole_configuration_with_defaults_validates() -> None:
    assert is_valid(parse_yaml(to_yaml(RunConfig())).value)


@pytest.mark.parametrize(
    ("text", "is_good"),
    [
        ("{}", True),
        ("model: {d_model: 64, n_heads: 2}", True),
        ("train:", True),
        ("model: {wave: , sine_params: {learnable: [decay]}}", True),
        ("data: {sources: corpus/, val_split: 0.1}", True),
        ("data: {sources: [a.txt, {path: b, per_line: yes}, {builtin: python-reference}]}", True),
        ("train: {ddp: off, fsdp: no, compile: On, amp: null, eval_interval_steps: 0}", True),
        ("train: {grad_clip: null, batch_tokens: 4096.0}", True),
        ("trian: {lr: 1}", False),
        ("train: {learning_rate: 1}", False),
        ("train: {lr: fast}", False),
        ("train: {lr: 0}", False),
        ("train: {fsdp: on}", False),
        ("train: {deepspeed: ds.json}", False),
        ("data: {sources: []}", False),
        ("data: {sources: [{path: a, builtin: python-reference}]}", False),
        ("data: {vocab_size: 260}", False),
        ("model: {short_conv: {kernel_size: 3}}", True),
        ("model: {wave: {}, short_conv: {}}", False),
        ("model: {sine_params: {decay_mode: sine}}", False),
        ("model: [waveresnet]", False),
    ],
)
def test_schema_agrees_with_loader_on_files(text: str, is_good: bool) -> None:
    value = parse_yaml(text).value
    assert is_valid(value) == is_good
    if is_good:
        config_from_mapping(value, check_files=False)  # type: ignore[arg-type]
    else:
        with pytest.raises(ConfigError):
            config_from_mapping(value, check_files=False)  # type: ignore[arg-type]


def test_every_key_has_description_and_default() -> None:
    def walk(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        groups = [schema, *schema.get("anyOf", [])]
        for name, inner in [pair for group in groups for pair in group.get("properties", {}).items()]:
            yield name, inner
            yield from walk(inner)

    listed = dict(walk(config_schema()))
    assert len(listed) > 60
    groups = {*SECTIONS, "sine_params", "short_conv", "wave", "lr_scale"}
    assert [name for name, schema in listed.items() if not schema.get("description")] == []
    assert {name for name, schema in listed.items() if "default" not in schema} == {*groups, "path", "builtin"}
    assert listed["optimizer"]["enum"] == ["adamw", "muon"]


def test_former_names_of_keys_are_accepted_and_deprecated() -> None:
    assert is_valid({"model": {"wave": {"kernel_size": 3}}})
    assert not is_valid({"model": {"wave": {"kernel_size": 0}}})
    assert not is_valid({"model": {"wave": {}, "short_conv": {}}}), "one key under two names"
    assert section_schema(SECTIONS["model"])["properties"]["wave"]["deprecated"] is True


def test_type_without_counterpart_is_refused() -> None:
    with pytest.raises(TypeError, match="no JSON Schema is known for <class 'bytes'>"):
        value_schema(bytes, [])


@pytest.mark.parametrize(
    "path",
    sorted(path for folder in ("configs", "examples") for path in (ROOT / folder).rglob("*.yaml")),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_shipped_files_name_their_schema_in_first_line(path: Path) -> None:
    first, _, rest = path.read_text(encoding="utf-8").partition("\n")
    kind = "config" if path in SHIPPED else "plan"
    key, _, target = first.partition("=")
    assert key == "# yaml-language-server: $schema"
    assert (path.parent / target).resolve() == ROOT / "docs" / "reference" / f"{kind}.schema.json"
    assert rest.startswith("# "), "what the file is for comes next"

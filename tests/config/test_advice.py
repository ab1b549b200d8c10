"""Suggestions for invalid values are valid themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psannlm.config.reference import keys
from psannlm.config.run import RunConfig, config_from_mapping, load_config
from psannlm.config.validation import SECTIONS, examine
from psannlm.config.yaml_loader import parse_yaml
from psannlm.errors import ConfigError

DEFAULTS = {key.path: key.default for key in keys()}
FIELDS = list(DEFAULTS)
# Written as in a file, after ``key: ``.
WRONG = [
    *(
        "0,003",
        "1.000,5",
        "1_000",
        "65,536",
        "1,000,000",
        "1.000.000",
        "65 536",
        "1,5",
        "-0,5",
        "512,0",
        "1'000",
        "0,5e-3",
    ),
    *(
        '"3e-4"',
        '"12"',
        '"0.5"',
        "1e-",
        "5%",
        "10 %",
        "0,5 %",
        "1/10",
        "1/0",
        "64k",
        "1.5M",
        "2G",
        "0b101",
        "0xZZ",
        "1:30",
    ),
    *(
        "2024-01-01",
        "nan",
        "inf",
        ".inf",
        ".nan",
        "-1",
        "0",
        "1",
        "16",
        "32",
        "2.5",
        "50",
        "1e400",
        "99999999999999999999",
    ),
    *(
        "yes",
        "No",
        "ON",
        "off",
        "TRUE",
        "false",
        "y",
        "n",
        '"true"',
        '"no"',
        "maybe",
        "none",
        "None",
        "null",
        "~",
        "auto",
        "",
    ),
    *(
        "gpu",
        "GPU:1",
        "cuda0",
        "CUDA:0",
        "CPU",
        "mps",
        "BF16",
        "AdamW",
        "full",
        "hello",
        "a, b",
        '""',
        "2024",
        "0777",
        "'0'",
    ),
    *("[]", "[1]", "[0.5]", "[cpu]", "[true]", "[a, b]", "[null]", "[1, 2, 3]", "['0,1', 2]", "[[1]]", "{a: b}", "{}"),
    *('"[0.1, 2]"', "0.1,2", "amplitude", "amplitude, decay", "MLP", "[MLP]", "[amp]", "{enabled: yes}", "{path: 5}"),
]
_INTERNALS = re.compile(
    r"pydantic|literal\[|union|[Ii]nput should|tuple\[|function-|validat(?!ion every )|_type\b|_parsing|"
    r"constrained|lax-or|\bbool\b|\bint\b|\bfloat\b|\bstr\b|\bdict\b|NoneType|Config\b|Section|object at 0x"
)


def put(path: str, value: object) -> dict[str, Any]:
    """Return a configuration that holds ``value`` at ``path`` alone; ``[]`` stands for the first item of a list."""
    whole: dict[str, Any] = {}
    group: Any = whole
    parts = path.split(".")
    for part in parts[:-1]:
        group = group.setdefault(part.removesuffix("[]"), [{}] if part.endswith("[]") else {})
        group = group[0] if isinstance(group, list) else group
    group[parts[-1]] = value
    return whole


def issues(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield place and message of what is wrong with single values, rules across fields left out."""
    for name, cls in SECTIONS.items():
        examined = examine(cls, (name,), config.get(name))
        checks = {check.message for check in _checks(examined.section)}
        yield from ((str(f.path), f.message) for f in examined.issues if f.message not in checks)


def _checks(section: Any) -> Iterator[Any]:
    yield from section.checks()
    for name in type(section).model_fields:
        if hasattr(inner := getattr(section, name), "checks"):
            yield from _checks(inner)


def recommended(message: str, written: str) -> list[str]:
    """Return every text that a message says to write."""
    if message.endswith("; remove the quotes"):
        return [str(parse_yaml(written).value)]
    if close := re.search(r"did you mean '(.*)'\?", message):
        return [close[1]]
    found = re.search(r"; (?:write|quote it:) (.*)\Z", message)
    return found[1].split(" or ") if found else []


def check_advice(path: str, written: str) -> int:
    value = parse_yaml(written).value
    n_followed = 0
    for place, message in issues(put(path, value)):
        assert not _INTERNALS.search(message.replace(repr(value), "")), message
        assert not _INTERNALS.search(place), place
        assert "\n" not in message
        for text in recommended(message, written):
            tree = parse_yaml(text)
            # Advice about an item of a list is followed in its place.
            index = re.search(r", (\d+)\)\Z", place)
            follow: Any = tree.value
            if index and isinstance(value, list):
                follow = [*value[: int(index[1])], follow, *value[int(index[1]) + 1 :]]
            again = [(p, m) for p, m in issues(put(path, follow)) if p == place]
            assert not tree.faults
            assert not again, f"{path}: {written} -> {message} -> {again}"
            n_followed += 1
    return n_followed


@pytest.mark.parametrize("path", FIELDS)
def test_advice_is_accepted_when_it_is_followed(path: str) -> None:
    assert sum(check_advice(path, written) for written in [*WRONG, DEFAULTS[path].upper()]) >= 1


@given(st.sampled_from(FIELDS), st.text(alphabet="0123456789.,_ eE+-%kM/'[]yesnofYESNOF", max_size=9))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_advice_holds_for_any_short_text(path: str, text: str) -> None:
    check_advice(path, f'"{text}"')


@pytest.mark.parametrize(
    ("key", "written", "advice"),
    [
        ("train.lr", "0,003", "write 0.003"),
        ("train.lr", "1.000,5", "write 1000.5"),
        ("train.lr", "1,000", "write 1000 or 1.000"),
        ("train.lr", "1_000", "write 1000"),
        ("train.lr", '"3e-4"', "remove the quotes"),
        ("train.lr", "5%", "write 0.05"),
        ("train.lr", "[0.1]", "write 0.1"),
        ("train.lr", "null", "drop the key for its default, 0.0002"),
        ("train.batch_tokens", "65,536", "write 65536"),
        ("train.batch_tokens", "64k", "write 64000 or 65536"),
        ("train.device", "0", "write cuda:0"),
        ("train.device", '"1"', "write cuda:1"),
        ("train.device", "gpu", "write cuda"),
        ("train.amp", "BF16", "write bf16"),
        ("train.amp", "off", "write fp32"),
        ("train.fsdp", "yes", "write full"),
        ("train.compile", "1", "write true"),
        ("train.compile", "null", "write auto"),
        ("train.grad_clip", "off", "write null"),
        ("train.max_steps", "none", "write null"),
        ("data.val_split", "10", "write 0.1"),
        ("data.val_split", "1/8", "write 0.125"),
        ("model.short_conv", "on", "write {enabled: true}"),
        ("model.sine_params.amp_bounds", "'0.1,2'", "write [0.1,2]"),
        ("model.sine_params.learnable", "amplitude", "write [amplitude]"),
        ("data.sources", "[5]", "write '5'"),
    ],
)
def test_advice_names_the_most_likely_value(key: str, written: str, advice: str) -> None:
    (issue,) = issues(put(key, parse_yaml(written).value))
    assert issue[1].endswith(f"; {advice}")


@pytest.mark.parametrize(
    ("written", "lr"), [("0,003", "0.003"), ("-0,5", None), ("1,000,000", "1000000"), ("65,536.5", "65536.5")]
)
def test_a_comma_in_braces_is_read_as_written(tmp_path: Any, written: str, lr: str | None) -> None:
    (tmp_path / "c.yaml").write_text(f"train: {{seed: 3, lr: {written}, epochs: 2}}\n")
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / "c.yaml")
    (problem,) = refused.value.problems
    assert problem.message.startswith(f"'{written}' is not a number")
    assert problem.path == "train.lr"
    assert lr is None or f"write {lr}" in problem.message


@pytest.mark.parametrize("word", ["yes", "Yes", "YES", "on", "On", "true", "TRUE", "no", "No", "off", "OFF", "False"])
@pytest.mark.parametrize("quote", ["", "'"])
def test_words_for_true_and_false_count_in_any_case(word: str, quote: str) -> None:
    is_true = word.lower() in ("yes", "on", "true")
    value = parse_yaml(f"{quote}{word}{quote}").value
    train = config_from_mapping({"train": {"compile": value, "ddp": value, "tensorboard": value}}).train
    assert (train.compile, train.ddp, train.tensorboard) == (is_true, "on" if is_true else "off", is_true)
    model = config_from_mapping({"model": {"residual_scale": value, "short_conv": {"enabled": value}}}).model
    assert (model.residual_scale, model.short_conv.enabled) == (is_true, is_true)
    if not is_true:
        assert config_from_mapping({"train": {"fsdp": value}}).train == RunConfig().train


def test_a_wrong_choice_is_one_problem_with_all_choices() -> None:
    ((place, message),) = issues({"train": {"compile": "maybe"}})
    assert place == str(("train", "compile"))
    assert message == "'maybe' is not one of auto, true, false"


@pytest.mark.parametrize(
    "written", ["2024-01-01", "1:30", "0777", "1e-3", "0o17", "0x1F", "!!int 5", "a\tb", "lr:\t1", "- a: [b, {c: d}]"]
)
@pytest.mark.parametrize("path", FIELDS[::4])
def test_odd_spellings_end_in_a_value_or_a_sentence(tmp_path: Any, path: str, written: str) -> None:
    section, key = path.split(".")[0], path.split(".")[-1]
    (tmp_path / "c.yaml").write_text(f"{section}:\n  {key}: {written}\n")
    try:
        load_config(tmp_path / "c.yaml", check_files=False)
    except ConfigError as error:
        message = str(error)
        assert message
        assert not _INTERNALS.search(message.replace(written, "")), message

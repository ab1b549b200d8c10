from __future__ import annotations

import math
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psannlm.config.yaml_loader import dump_yaml, parse_yaml, read_number, read_yaml
from psannlm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("1.10", 1.1),
        ("-.inf", -math.inf),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("+7", 7),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("true", True),
        ("FALSE", False),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("0b11", "0b11"),
        ("~", None),
        ("Null", None),
        ("''", ""),
        ("'3'", "3"),
        ("!!str 3", "3"),
        ("!!float 3", 3.0),
        ("", None),
        ("=", "="),
        ("<<", "<<"),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text: str, value: object) -> None:
    read = parse_yaml(f"key: {text}").value
    assert read == {"key": value}
    assert type(read["key"]) is type(value)


def test_every_key_and_item_has_its_line() -> None:
    tree = parse_yaml("model:\n  base: x\n\ndata:\n  sources:\n    - a\n    - path: b\n")
    assert tree.lines[("model", "base")] == 2
    assert tree.lines[("data",)] == 4
    assert tree.lines[("data", "sources", 0)] == 6
    assert tree.lines[("data", "sources", 1, "path")] == 7


def test_a_key_given_twice_names_both_lines() -> None:
    tree = parse_yaml("train:\n  lr: 1\n  epochs: 2\n  lr: 3\n")
    assert tree.faults == [(("train", "lr"), "given twice, in lines 2 and 4; keep one")]


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['true']",
        "a: !!python/name:os.system ''",
        "a: !mine {b: 1}",
        "a: !mine [1]",
        "a: !!set {b}",
        "a: !!binary aGk=",
        "a: !!timestamp 2024-01-01",
        "a: !!int x",
        "a: !!bool maybe",
    ],
)
def test_no_tag_builds_an_object(text: str) -> None:
    tree = parse_yaml(text)
    assert tree.value == {"a": None}
    assert [path for path, _ in tree.faults] == [("a",)]


def _bomb(width: int, levels: int) -> str:
    lines = ["a0: &a0 [" + ", ".join("x" * width) + "]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [" + ", ".join(f"*a{level - 1}" for _ in range(width)) + "]")
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        _bomb(9, 10),
        "a: &a [*a]",
        "a: &a {b: *a}",
        "[" * 100_000,
        "{a: " * 50_000,
        "- " * 50_000,
        "a: " + "[1," * 20_000,
        "x: [" + "1," * 100_000 + "]",
        "? " * 20_000,
        "a: '" + "x\n" * 60_000,
    ],
    ids=["bomb", "self-list", "self-map", "brackets", "braces", "dashes", "pairs", "many", "complex", "open-quote"],
)
def test_hostile_text_is_refused_fast_and_small(text: str) -> None:
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text)
    elapsed_s = time.perf_counter() - started
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "\n" not in str(caught.value)
    # Measured under tracemalloc, which slows allocation several times.
    assert elapsed_s < 8
    assert peak_bytes < 100e6


def test_aliases_within_reason_are_read() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x").value == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a:\n\tb: 1", "line 2"),
        ("a:\n\tb: 1", "replace tabs by spaces"),
        ("a: [1, 2", "line 1"),
        ("a: b: c", "a second ':'"),
        ("a: 1\n---\nb: 2", "a second document"),
        ("a: *nowhere", "nowhere"),
        ("a: \x00", "U+0000"),
        ('a: "\\UFFFFFFFF"', "names no Unicode character"),
        ("%YAML 3.0\n---\na: 1", "line 1"),
    ],
)
def test_syntax_error_is_one_line_with_its_position(text: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "run.yaml")
    assert part in str(caught.value)
    assert str(caught.value).startswith("run.yaml: ")
    assert "\n" not in str(caught.value)


def test_yaml_odd_keys_and_long_numbers_are_refused() -> None:
    tree = parse_yaml("[a, b]: 1\nn: " + "9" * 5000)
    assert [path for path, _ in tree.faults] == [("[...]",), ("n",)]
    assert all(len(message) < 120 for _, message in tree.faults)
    assert parse_yaml("on: 1\n12: 2").value == {"on": 1, "12": 2}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"a: \xff\n", "is not UTF-8: byte 0xff in line 1"),
        (b"a: 1\nb: \xc3(\n", "line 2"),
        ("a: 1".encode("utf-16"), "is not UTF-8"),
        (b"#" * ((1 << 18) + 1), "larger than"),
        (b"PK\x03\x04 zip", "U+0003"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert part in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\n")
    assert read_yaml(path).value == {"a": 1}


def test_read_yaml_missing_file_suggests_name(tmp_path: Path) -> None:
    (tmp_path / "waveresnet.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"no such file \(did you mean 'waveresnet.yaml'\?\)"):
        read_yaml(tmp_path / "wavresnet.yml")
    with pytest.raises(ConfigError, match="is a folder"):
        read_yaml(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(Path("a\0b"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / ("x" * 5000))


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**64), 2**64), st.floats(allow_nan=False), _TEXT)
_TRICKY = st.sampled_from(["2e-4", "on", "null", "0o7", "0x1", ".inf", "~", "1_0", "- a", "a: b", "#", " x ", "\ufeff"])
_VALUES = st.recursive(
    _SCALARS | _TRICKY,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT.filter(bool) | _TRICKY, inner, max_size=4),
    max_leaves=12,
)


@given(_VALUES)
def test_yaml_dump_round_trips_types(value: Any) -> None:
    tree = parse_yaml(dump_yaml(value))
    assert tree.value == value
    assert repr(tree.value) == repr(value)
    assert tree.faults == []


@given(st.text("+-.0123456789eExoabINFnaf_", max_size=12).filter(lambda text: text != "-" and text[:3] != "---"))
def test_read_number_agrees_with_the_reader(text: str) -> None:
    value = parse_yaml(f"k: !!str\nv: {text}").value
    assert isinstance(value, dict)
    read = value["v"]
    number = read_number(text)
    is_number = isinstance(read, (int, float)) and not isinstance(read, bool)
    assert (number is not None) == is_number
    if number is not None:
        assert repr(number) == repr(read)

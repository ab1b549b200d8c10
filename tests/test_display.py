"""Escaping of untrusted text, and reading it back."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shlex
import subprocess
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psannlm.config.overrides import Origin, apply_override
from psannlm.display import (
    csv_cell,
    html_text,
    json_text,
    markdown_code,
    markdown_text,
    printable,
    shell_argument,
    shell_command,
    shortened,
    yaml_scalar,
)

# Everything that a file name on POSIX can hold, bytes that are not UTF-8 included.
PATHS = st.lists(
    st.one_of(
        st.characters(exclude_categories=("Cs",), exclude_characters="\0"),
        st.sampled_from("'\"[]{},:#&*!|>%@`~$\\ \t\n\r-=\x1b\x7f\x85\u2028\ufeff"),
        st.integers(0xDC80, 0xDCFF).map(chr),
    ),
    min_size=1,
).map("".join)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\x9b2Jb\x7f", "a\\x9b2Jb\\x7f"),
        ("\u202egnp.exe\u2066", "\\u202egnp.exe\\u2066"),
        ("one\ntwo\rthree\t", "one\\ntwo\\rthree\\t"),
        (os.fsdecode(b"caf\xe9.txt"), "caf\\xe9.txt"),
        ("\ud83d", "\\ud83d"),
        ("é 中文 👩‍💻 :100: [red]", "é 中文 👩‍💻 :100: [red]"),
        ("\u3000", "\u3000"),
    ],
)
def test_unseen_characters_are_shown_as_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_kept_characters_stay() -> None:
    assert printable("a\n\tb\r\x1b", keep="\n\t") == "a\n\tb\\r\\x1b"


@given(st.text())
def test_printable_text_can_be_encoded_and_is_stable(text: str) -> None:
    shown = printable(text)
    shown.encode("utf-8")
    assert printable(shown) == shown
    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in shown)


class _Text(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(f"<p>{page}</p>")
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text(st.sampled_from("<>&\"'ab=/ \x1b\u202e")))
def test_html_holds_the_text_and_no_element(text: str) -> None:
    page = _Text(html_text(text))
    assert page.tags == ["p"]
    assert page.text == printable(text)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a.png) <img src=x onerror=alert(1)> .png", "a.png) &lt;img src=x onerror=alert(1)&gt; .png"),
        ("[x](y) ![z](w)", "\\[x\\](y) !\\[z\\](w)"),
        ("a|b`c`*d*$e$~f~", "a\\|b\\`c\\`\\*d\\*\\$e\\$\\~f\\~"),
        ("loss_curve_2 _x_ __y__", "loss_curve_2 \\_x\\_ \\_\\_y\\_\\_"),
        ("# title", "\\# title"),
        ("- item", "\\- item"),
        ("12. item", "12\\. item"),
        ("12 items", "12 items"),
        ("one\n\n# two\x1b", "one # two\\\\x1b"),
    ],
)
def test_markdown_gives_text_no_meaning(text: str, escaped: str) -> None:
    assert markdown_text(text) == escaped


def test_markdown_code_quotes_backticks_and_markup() -> None:
    assert markdown_code("psannlm train a.yaml") == "`psannlm train a.yaml`"
    assert markdown_code("a `b` <c>") == "<code>a \\`b\\` &lt;c&gt;</code>"
    assert markdown_code("") == ""


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "＝"])
def test_csv_text_never_becomes_a_formula(start: str) -> None:
    assert csv_cell(f"{start}cmd|' /C calc'!A0") == f"'{start}cmd|' /C calc'!A0"


def test_tabs_and_returns_in_csv_are_escapes() -> None:
    assert csv_cell("\t=1") == "'\\t=1"
    assert csv_cell("\r=1") == "'\\r=1"


@pytest.mark.parametrize("value", [-1, -0.1, 0.1 + 0.2, 5e-324, 1e308, 10**300, "-1.5e-3", "+2", True])
def test_numbers_in_csv_stay_as_they_are(value: object) -> None:
    page = io.StringIO()
    csv.writer(page).writerow([csv_cell(value)])
    assert page.getvalue().strip() == str(value)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, pytest.param(10**5000, id="huge")])
def test_csv_cell_is_empty_for_unreadable_values(value: object) -> None:
    assert csv_cell(value) == ""


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("is_ascii", [False, True])
def test_json_is_strict_and_reads_back(indent: int | None, is_ascii: bool) -> None:
    path = os.fsdecode(b"caf\xe9\x1b")
    content = {"a": [math.nan, {"b": -math.inf}], "path": path, "x": 0.1 + 0.2, "n": 10**400, "t": ("\x9b\u202e", 1)}
    text = json_text({**content, "huge": 10**5000, "set": frozenset({1})}, indent=indent, is_ascii=is_ascii)
    text.encode("ascii" if is_ascii else "utf-8")
    assert printable(text, keep="\n") == text

    def refuse(word: str) -> None:
        raise AssertionError(word)

    read = json.loads(text, parse_constant=refuse)
    assert read == {
        "a": [None, {"b": None}],
        "path": path,
        "x": 0.1 + 0.2,
        "n": 10**400,
        "t": ["\x9b\u202e", 1],
        "huge": None,
        "set": "frozenset({1})",
    }


@pytest.mark.slow
@given(st.recursive(st.floats(allow_nan=False, allow_infinity=False) | st.text(), lambda inner: st.lists(inner)))
def test_any_json_is_printable_and_reads_back(value: object) -> None:
    text = json_text([value])
    assert printable(text) == text
    assert json.loads(text) == [value]


@given(PATHS)
def test_printed_override_round_trips_paths(path: str) -> None:
    printed = shell_command("psannlm", "train", "CONFIG", "--set", f"data.sources=[{yaml_scalar(path)}]")
    assert printable(printed) == printed
    words = shlex.split(printed)
    assert words[:4] == ["psannlm", "train", "CONFIG", "--set"]
    tree: dict[str, object] = {}
    assert apply_override(tree, words[4], Origin({})) == []
    assert tree == {"data": {"sources": [path]}}


@pytest.mark.parametrize("path", ["prepared", "/data/a-b_c.d/e", "a/b"])
def test_a_plain_path_is_printed_plainly(path: str) -> None:
    assert shell_command("--set", f"data.sources=[{yaml_scalar(path)}]") == f"--set 'data.sources=[{path}]'"


@pytest.mark.parametrize("path", ["no", "NULL", "true", "1e3", "-x", "~", "a: b", "a #b", "on", ""])
def test_printed_override_quotes_yaml_lookalikes(path: str) -> None:
    assert yaml_scalar(path) == f'"{path}"'


@pytest.mark.parametrize("path", ["it's a $HOME `x`", "a\x1b[2J'\\b", os.fsdecode(b"caf\xe9\x01"), "\u202eé", "a\nb"])
def test_printed_argument_round_trips_through_bash(path: str) -> None:
    argument = shell_argument(path)
    assert printable(argument, keep="\n") == argument
    done = subprocess.run(["bash", "-c", f"printf %s {argument}"], capture_output=True, check=True)
    assert done.stdout == os.fsencode(path)


def test_long_text_loses_its_middle() -> None:
    assert shortened("a" * 300) == "a" * 300
    assert shortened("a" * 200 + "b" * 200, 101) == "a" * 50 + "…" + "b" * 50

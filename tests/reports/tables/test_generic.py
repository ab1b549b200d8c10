"""Generic tables and formatted values, derived from the names and shapes of figures."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psannlm.io.readers import number
from psannlm.reports.page_model import format_float, format_value, signed
from psannlm.reports.tables.generic import heading, memory_rows, rate_rows, tables_of

KEYS = st.sampled_from(
    "name,tokens_per_s,tokens_per_s_lowest,peak_bytes,cache_bytes,measured,step_s,seconds,median,lowest,highest,base,"
    "grad_checkpoint,rows,checks,".split(",")
)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (1234567, "1,234,567"),
        (True, "yes"),
        (None, "–"),
        (0.0, "0"),
        (73.50903, "73.51"),
        (123456.7, "123,457"),
        (9.9999e-07, "1.000e-06"),
        (0.000123456, "0.0001235"),
        (float("inf"), "–"),
        ({"median": 2.0, "lowest": 1.0, "highest": 3.0}, "2.000 (1.000 to 3.000)"),
    ],
)
def test_format_value_known_values(value: object, told: str) -> None:
    assert format_value(value) == told


def test_signed_known_values() -> None:
    assert (signed(-0.25, 2), signed(0.25, 2), signed(0.0, 2), signed(None)) == ("−0.25", "+0.25", "±0", "–")
    assert format_float(-1234.5) == "-1,234"


def test_heading_separates_the_unit() -> None:
    assert heading("decode_tokens_per_s") == "decode, tokens/s"
    assert heading("cases.prefill_s") == "cases prefill, s"
    assert heading("bits_per_byte") == "bits per byte"


def test_heading_names_rooflines_by_their_present_word() -> None:
    assert heading("bandwidth_floor") == "roofline"
    assert heading("bandwidth_floor.floor_s") == "roofline roofline, s"
    assert heading("fraction_of_floor") == "fraction of roofline"


def test_tables_of_lists_and_mappings_of_rows() -> None:
    figures = {
        "device": "cpu",
        "cases": [{"name": "a", "rate_s": 1.5}, {"name": "b"}],
        "by_name": {"x": {"n": 1, "inner": {"m": 2}}, "y": {"n": 3}},
        "group": {"one": 1, "two": {"three": 3}},
        "empty": [],
    }
    cases, by_name, alone = tables_of(figures)
    assert (cases.headings, cases.rows) == (["name", "rate, s"], [["a", "1.500"], ["b", "–"]])
    assert cases.numbers == {1}
    assert by_name.rows == [["x", "1", "2"], ["y", "3", "–"]]
    assert alone.rows == [("device", "cpu"), ("group one", "1"), ("group two three", "3")]


def test_rate_rows_inherit_context_of_outer_mappings() -> None:
    figures = {
        "batch_tokens": 64,
        "bases": {"sine": {"base": "respsann", "tokens_per_s": 5.0}, "gelu": {"base": "transformer", "mb_per_s": 1.0}},
    }
    (row,) = rate_rows(figures)
    assert (row["name"], row["base"], row["batch_tokens"], row["tokens_per_s"]) == ("bases / sine", "respsann", 64, 5.0)
    assert row["tokens_per_s_lowest"] is None
    flat = {"rows": [{"name": "a", "tokens_per_s": 2.0, "tokens_per_s_lowest": 1.0, "tokens_per_s_highest": 3.0}]}
    (row,) = rate_rows(flat)
    assert [row[f"tokens_per_s{edge}"] for edge in ("", "_lowest", "_highest")] == [2.0, 1.0, 3.0]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.slow
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_generic_tables_and_rows_take_any_figures(figures: dict[str, Any]) -> None:
    for table in tables_of(figures):
        assert all(isinstance(cell, str) for row in table.rows for cell in row)
    for row in rate_rows(figures):
        assert number(row["tokens_per_s"]) is not None
    for row in memory_rows(figures):
        assert number(row["bytes"]) is not None

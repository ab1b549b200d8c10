"""Suggestions for invalid configuration values, each validated before it is recommended."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from psannlm.config.base import word_to_bool
from psannlm.config.yaml_loader import flow_yaml, parse_yaml, read_number
from psannlm.errors import ConfigError

Due = Literal["value", "whole number", "list", "group"]

_SCALARS = (str, bool, int, float, type(None))
_LONGEST_ADVICE = 80
_MOST_READINGS = 2
# Groups of three digits, with one and the same separator between them: 65,536, 65 536, 65.536.000, 1'000, 1_000.
_SPACES = "  \N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}"
_GROUPED = re.compile(
    rf"[-+]?[1-9][0-9]{{0,2}}(?:([,.'\N{{RIGHT SINGLE QUOTATION MARK}}{_SPACES}])[0-9]{{3}})(?:\1[0-9]{{3}})*"
)
_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_MULTIPLES = {"k": (1000, 1024), "m": (10**6, 2**20), "g": (10**9, 2**30), "b": (10**9,)}
_WORDS_FOR_NULL = {"none", "nil", "null", "auto", "default", "never", "unlimited", "inf", "infinity", "-", "~"}
_WORDS_FOR_OFF = ("off", "none", "fp32", "null")
_WORDS_FOR_ON = ("on", "full", "auto")


def advice(value: object, accepts: Callable[[object], bool], due: Due = "value") -> str:
    """Return ``; write X`` or ``; write X or Y`` for the first readings of ``value`` that ``accepts`` takes, or ''.

    Suggestions are YAML that is parsed and validated, so that they are never rejected. ``due``: the expected kind of
    value: 1,000 is a thousand where a whole number is expected, and may be one elsewhere.
    """
    if isinstance(value, (list, tuple)) and len(value) == 1 and due != "list":
        # A list of one item where a plain value is expected.
        if type(value[0]) in _SCALARS and accepts(value[0]):
            return f"; write {flow_yaml(value[0])}"
        value = value[0]
    if type(value) not in _SCALARS or _is_long(value):
        return ""
    # Where any text is valid, do not interpret it as a number, device or switch.
    readings = _plain_readings(value) if accepts("some text") else _readings(value, due)
    whole = due == "whole number"
    found: list[str] = []
    for text in readings:
        if text in found or (accepted := _accepted(text, accepts, whole)) is None:
            continue
        found.append(accepted)
        if len(found) == _MOST_READINGS or not _is_ambiguous(value, whole):
            break
    if isinstance(value, str) and found == [value]:
        return "; remove the quotes"
    return f"; write {' or '.join(found)}" if found else ""


def _is_long(value: object) -> bool:
    # Python refuses to print integers of more than 4,300 digits.
    return (isinstance(value, str) and len(value) > _LONGEST_ADVICE) or (type(value) is int and abs(value) >= 1 << 64)


def _accepted(text: str, accepts: Callable[[object], bool], whole: bool) -> str | None:
    """Return ``text`` if it is YAML of an accepted value, without ``.0`` where a whole number is expected."""
    if len(text) > _LONGEST_ADVICE:
        return None
    value, is_value = _read(text)
    if not is_value or not accepts(value):
        return None
    return str(int(value)) if whole and isinstance(value, float) and value.is_integer() else text


@lru_cache(maxsize=4096)
def _read(text: str) -> tuple[object, bool]:
    try:
        tree = parse_yaml(text)
    except ConfigError:
        return None, False
    return tree.value, not tree.faults


def _is_ambiguous(value: object, whole: bool) -> bool:
    """Return whether a text can be read as two numbers: 1,000 is one or a thousand, 64k is 64,000 or 65,536."""
    text = value.strip() if isinstance(value, str) else ""
    return bool(re.fullmatch(rf"{_NUMBER}\s*[kKmMgG]", text) or (_GROUPED.fullmatch(text) and not whole))


def _plain_readings(value: object) -> Iterator[str]:
    """Yield ``value`` as text."""
    if isinstance(value, (str, bool, int, float)):
        yield flow_yaml(value if isinstance(value, str) else show_scalar(value))
    elif value is None:
        yield "null"


def _readings(value: object, due: Due) -> Iterator[str]:
    """Yield interpretations of ``value`` as YAML, the most likely first."""
    if isinstance(value, str):
        yield from _readings_of_text(value)
    elif isinstance(value, bool):
        yield from _WORDS_FOR_ON if value else _WORDS_FOR_OFF
    elif isinstance(value, (int, float)):
        yield from _readings_of_number(value)
    elif value is None:
        yield from ("none", "auto", "[]")
    if due == "list" and isinstance(value, (str, bool, int, float)):
        yield from (flow_yaml([value]), flow_yaml([show_scalar(value)]), f"[{value}]")
        if isinstance(value, str):
            yield flow_yaml([part.strip() for part in value.split(",")])
    if due == "group" and isinstance(value, (str, bool)):
        word = word_to_bool(value) if isinstance(value, str) else value
        if word is not None:
            yield f"{{enabled: {flow_yaml(word)}}}"


def show_scalar(value: str | bool | int | float) -> str:
    """Return a scalar in YAML notation without quotes."""
    return value if isinstance(value, str) else flow_yaml(value)


def _readings_of_text(value: str) -> Iterator[str]:
    text = value.strip()
    if read_number(text) is not None:
        yield text
    yield from _numbers(text)
    yield from _devices(text)
    word = word_to_bool(text)
    if word is None and text.lower() in ("y", "n", "1", "0"):
        word = text.lower() in ("y", "1")
    if word is not None:
        yield flow_yaml(word)
        yield from _WORDS_FOR_ON if word else _WORDS_FOR_OFF
    if text.lower() in _WORDS_FOR_NULL:
        yield "null"
    yield text.lower()
    yield text


def _readings_of_number(value: int | float) -> Iterator[str]:
    if value in (0, 1):
        yield flow_yaml(bool(value))
    yield from _devices(str(value))
    if isinstance(value, int) and value in (16, 32):
        yield f"fp{value}"
    if 1 < value <= 100:  # a percentage where a fraction is due
        yield _decimal(Fraction(value) / 100)
    if isinstance(value, float) and value == float("inf"):
        yield "null"
    yield flow_yaml(str(value))


def _numbers(text: str) -> Iterator[str]:
    """Yield interpretations of ``text`` as a number: separators, percent, fractions, suffixes, binary."""
    if re.fullmatch(r"[-+]?[0-9]+(?:_[0-9]+)+(?:\.[0-9]+)?", text):
        yield text.replace("_", "")
    if re.fullmatch(r"[-+]?0[bB][01]+", text):
        yield str(int(text, 2))
    if match := _GROUPED.fullmatch(text):
        yield text.replace(match[1], "")
    # Groups and a decimal mark: 1.000,5 and 1,000.5.
    whole, mark, rest = _last_mark(text)
    if mark and (match := _GROUPED.fullmatch(whole)) and match[1] != mark and re.fullmatch("[0-9]+", rest):
        yield f"{whole.replace(match[1], '')}.{rest}"
    if match := re.fullmatch(r"([-+]?[0-9]*),([0-9]+(?:[eE][-+]?[0-9]+)?)", text):
        yield f"{match[1] or '0'}.{match[2]}"
    plain = text.replace(",", ".")
    if match := re.fullmatch(rf"({_NUMBER})\s*%", plain):
        yield _decimal(Fraction(match[1]) / 100)
    if (match := re.fullmatch(r"([0-9]{1,9})\s*/\s*([0-9]{1,9})", text)) and int(match[2]):
        yield _decimal(Fraction(int(match[1]), int(match[2])))
    if match := re.fullmatch(rf"({_NUMBER})\s*([kKmMgGbB])", plain):
        for factor in _MULTIPLES[match[2].lower()]:
            yield _decimal(Fraction(match[1]) * factor)


def _last_mark(text: str) -> tuple[str, str, str]:
    at = max(text.rfind(","), text.rfind("."))
    return (text, "", "") if at < 0 else (text[:at], text[at], text[at + 1 :])


def _decimal(value: Fraction) -> str:
    """Return a whole number without an exponent, any other with up to six digits."""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"


def _devices(text: str) -> Iterator[str]:
    """Yield interpretations of ``text`` as a device."""
    lowered = text.lower()
    if match := re.fullmatch(r"(?:cuda|gpu)?[\s:_-]*([0-9]{1,3})", lowered):
        yield f"cuda:{int(match[1])}"
    if lowered in ("gpu", "nvidia", "cuda"):
        yield "cuda"
    if lowered in ("mps", "metal", "apple"):
        yield "mps"

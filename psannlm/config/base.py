"""Base class and field types of the configuration: frozen, no unknown keys, strict types, checks across fields."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real as AnyReal
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from psannlm.errors import ConfigError, Problem
from psannlm.io.filenames import can_be_in_name

_LARGEST_WHOLE = 2**63 - 1


@dataclass(frozen=True)
class Check:
    """A violated rule across fields: all fields involved, the one to report first, and the message with its remedy."""

    fields: tuple[str, ...]
    message: str


class Section(BaseModel):
    """A frozen group of settings that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False, validate_default=False)

    # Former names of keys, which are still read, and the present name of each. The present names alone are written.
    former_keys: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _rename_former_keys(cls, given: Any) -> Any:
        if not cls.former_keys or not isinstance(given, Mapping):
            return given
        if doubled := cls.doubled_keys(given):
            raise ConfigError([Problem(key, message) for key, message in doubled.items()])
        return cls.with_present_keys(given)

    @classmethod
    def doubled_keys(cls, given: Mapping[Any, Any]) -> dict[str, str]:
        """Return a message for each former key in ``given`` whose present name is there too."""
        return {
            former: f"is the former name of {key}, and both are given; keep {key}"
            for former, key in cls.former_keys.items()
            if former in given and key in given
        }

    @classmethod
    def with_present_keys(cls, given: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return ``given`` with its former keys under their present names, except where both are there."""
        return {
            key if cls.former_keys.get(key, key) in given else cls.former_keys.get(key, key): value
            for key, value in given.items()
        }

    def checks(self) -> list[Check]:
        """Return the violated rules across fields of this section."""
        return []

    @model_validator(mode="after")
    def _raise_on_checks(self, info: ValidationInfo) -> Self:
        # With "collect", violated rules are reported together with the errors of single fields.
        context: dict[str, Any] = info.context or {}
        if not context.get("collect") and (found := self.checks()):
            raise ConfigError([Problem(check.fields[0], check.message) for check in found])
        return self


def _to_int(value: object) -> object:
    """Convert 3.0 and integers of other libraries, such as NumPy, to int."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (bool, int, float)) or not hasattr(value, "__index__"):
        return value
    return value.__index__()


_WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


def word_to_bool(value: object) -> bool | None:
    """Return the boolean of yes, no, on, off, true and false in any case (YAML 1.1); None for all other values."""
    return _WORDS.get(value.strip().lower()) if isinstance(value, str) else None


def _to_bool(value: object) -> object:
    """Convert the words of :func:`word_to_bool`, quoted or not."""
    word = word_to_bool(value)
    return value if word is None else word


def _to_float(value: object) -> object:
    """Convert real numbers of other libraries to float."""
    return float(value) if isinstance(value, AnyReal) and not isinstance(value, (bool, int, float)) else value


def _to_text(value: object) -> object:
    """Convert a path object to text, and reject characters that cannot be in a text file."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(text, str) and any(char == "\0" or "\ud800" <= char <= "\udfff" for char in text):
        raise PydanticCustomError("bad_character", "holds a NUL or a lone surrogate, which no text can hold")
    return text


def _to_file_name(value: object) -> object:
    """Convert a path object to text, and reject characters that cannot be in a file name."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(text, str) and not all(map(can_be_in_name, text)):
        raise PydanticCustomError("bad_character", "holds a NUL or a lone surrogate, which no path can hold")
    return text


# Strict, because pydantic would otherwise convert "8" to 8 and true to 1.
Whole = Annotated[int, Strict(), BeforeValidator(_to_int), Field(le=_LARGEST_WHOLE)]
Real = Annotated[float, Strict(), BeforeValidator(_to_float)]
Flag = Annotated[bool, Strict(), BeforeValidator(_to_bool)]
Text = Annotated[str, Strict(), BeforeValidator(_to_text), Field(min_length=1)]
FileName = Annotated[str, Strict(), BeforeValidator(_to_file_name), Field(min_length=1)]
Prompt = Annotated[str, Strict(), BeforeValidator(_to_text)]  # may be empty
PositiveWhole = Annotated[Whole, Field(ge=1)]

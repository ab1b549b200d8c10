"""What every section of the configuration shares: frozen, no unknown keys, exact types, and checks across fields."""

from __future__ import annotations

import os
from dataclasses import dataclass
from numbers import Real as AnyReal
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from psannlm.errors import ConfigError, Problem
from psannlm.io.filenames import can_be_in_name

_LARGEST_WHOLE = 2**63 - 1


@dataclass(frozen=True)
class Check:
    """A rule across fields that is broken: all the fields involved (the first is the one to blame), and what to do."""

    fields: tuple[str, ...]
    message: str


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False, validate_default=False)

    def checks(self) -> list[Check]:
        """Return the rules across fields that this section breaks."""
        return []

    @model_validator(mode="after")
    def _raise_on_checks(self, info: ValidationInfo) -> Self:
        # The YAML reader collects broken rules itself, to print them together with the errors of single fields.
        context: dict[str, Any] = info.context or {}
        if not context.get("collect") and (found := self.checks()):
            raise ConfigError([Problem(check.fields[0], check.message) for check in found])
        return self


def _to_int(value: object) -> object:
    """Let 3.0 and integers of other libraries (NumPy's) count as integers."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (bool, int, float)) or not hasattr(value, "__index__"):
        return value
    return value.__index__()


_WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


def word_to_bool(value: object) -> bool | None:
    """Return what yes, no, on, off, true and false mean in any case, as YAML 1.1 has them; None for all else."""
    return _WORDS.get(value.strip().lower()) if isinstance(value, str) else None


def _to_bool(value: object) -> object:
    """Let the words for true and false count as such, quoted or not."""
    word = word_to_bool(value)
    return value if word is None else word


def _to_float(value: object) -> object:
    """Let real numbers of other libraries count as floats."""
    return float(value) if isinstance(value, AnyReal) and not isinstance(value, (bool, int, float)) else value


def _to_text(value: object) -> object:
    """Let a path object stand for its text, and refuse characters that no text file can hold."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(text, str) and any(char == "\0" or "\ud800" <= char <= "\udfff" for char in text):
        raise PydanticCustomError("bad_character", "holds a NUL or a lone surrogate, which no text can hold")
    return text


def _to_file_name(value: object) -> object:
    """Let a path object stand for its text, and refuse characters that no file name can hold."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(text, str) and not all(map(can_be_in_name, text)):
        raise PydanticCustomError("bad_character", "holds a NUL or a lone surrogate, which no path can hold")
    return text


# Pydantic on its own would read "8" as 8 and true as 1; a configuration says what it means.
Whole = Annotated[int, Strict(), BeforeValidator(_to_int), Field(le=_LARGEST_WHOLE)]
Real = Annotated[float, Strict(), BeforeValidator(_to_float)]
Flag = Annotated[bool, Strict(), BeforeValidator(_to_bool)]
Text = Annotated[str, Strict(), BeforeValidator(_to_text), Field(min_length=1)]
FileName = Annotated[str, Strict(), BeforeValidator(_to_file_name), Field(min_length=1)]
Prompt = Annotated[str, Strict(), BeforeValidator(_to_text)]  # may be empty: text from nothing
PositiveWhole = Annotated[Whole, Field(ge=1)]

"""Base of the schemas of ``metrics.json`` and ``summary.json``: their writers build them, and readers validate by them.

A schema is a pydantic dataclass whose fields are the keys of the file. Unknown keys are ignored, so that files of later
versions remain readable; former names of keys are aliases, and a key that early versions did not write has a default.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, TypeVar

from pydantic import (
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
)

from psannlm.io.readers import Unreadable, number

Schema = TypeVar("Schema", bound="Figures")
# 64 bits; larger whole numbers than a float can hold would raise errors in arithmetic.
_LARGEST_WHOLE = (1 << 63) - 1
# A file of many wrong values is described by their number: the description of each takes some KB.
_MOST_DESCRIBED = 1000


def figure(value: object, *, is_finite: bool = True) -> float:
    """Return a number as it is, and NaN for null and, with ``is_finite``, infinities, which JSON cannot express.

    Raises:
        ValueError: it is not a number.
    """
    if value is None or (is_finite and isinstance(value, float) and not math.isfinite(value)):
        return math.nan
    found = value if isinstance(value, float) else number(value)
    if found is None or (isinstance(found, int) and abs(found) > _LARGEST_WHOLE):
        raise ValueError("input should be a number")
    return found


def _optional_figure(value: object) -> float | None:
    found = figure(value)
    return None if math.isnan(found) else found


# Text and booleans are not numbers. A whole number stays one.
Figure = Annotated[float, PlainValidator(figure)]
OptionalFigure = Annotated[float | None, PlainValidator(_optional_figure)]
Whole = Annotated[int, Field(strict=True, ge=-_LARGEST_WHOLE, le=_LARGEST_WHOLE)]
Flag = Annotated[bool, Field(strict=True)]


class Figures:
    """Base of all schemas, whose subclasses are dataclasses.

    A ``Figure`` that was not finite is null in a file and NaN in memory; an ``OptionalFigure`` is None in both.
    """

    def as_dict(self) -> dict[str, Any]:
        """Return all figures as plain data, by the keys of the file."""
        plain: dict[str, Any] = _adapter(type(self)).dump_python(self, by_alias=True)
        return plain


def absent_if_none(*names: str) -> Any:
    """Return a serializer, to be set in the body of a schema, that leaves out those of ``names`` that are None."""

    def serialize(self: Any, plain_fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in plain_fields(self).items() if value is not None or key not in names}

    return model_serializer(mode="wrap")(serialize)


_ADAPTERS: dict[type[Figures], TypeAdapter[Any]] = {}


def _adapter(schema: type[Figures]) -> TypeAdapter[Any]:
    if schema not in _ADAPTERS:
        _ADAPTERS[schema] = TypeAdapter(schema)
    return _ADAPTERS[schema]


def read_figures(schema: type[Schema], figures: dict[str, Any]) -> Schema:
    """Return the figures of a file as ``schema``.

    Raises:
        Unreadable: they do not fit; the message names the first key that does not, and how many others.
    """
    try:
        found: Schema = _adapter(schema).validate_python(figures)
        return found
    except ValidationError as error:
        n_problems = error.error_count()
        if n_problems > _MOST_DESCRIBED:
            raise Unreadable(f"{n_problems:,} problems in its figures") from None
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    more = f" and {n_problems - 1:,} more problems" if n_problems > 1 else ""
    raise Unreadable(f"{key}{': ' if key else ''}{first['msg'].lower().removeprefix('value error, ')}{more}")
